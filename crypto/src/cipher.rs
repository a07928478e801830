//! A volume's cipher.

use std::fmt;

use block::{DATA_UNIT_BYTES, Lba};

use crate::engine::Xts;
use crate::{DataKey, Engine};

/// Bytes in one data unit.
const UNIT_BYTES: usize = 4096;
const _: () = assert!(DATA_UNIT_BYTES == 4096);

/// XTS-AES-256 under one volume's data key.
///
/// Data units are 4096 bytes; the tweak of a unit is its number in the volume as a 128-bit little-endian
/// integer (IEEE 1619-2007 section 5.1). That is dm-crypt's `aes-xts-plain64` with `sector_size:4096` and
/// `iv_large_sectors`.
pub struct VolumeCipher {
    xts: Xts,
}

impl VolumeCipher {
    /// Expands the key for the preferred engine.
    pub fn new(key: &DataKey) -> Self {
        Self::with_engine(Engine::preferred(), key)
    }

    /// Expands the key for `engine`.
    pub fn with_engine(engine: Engine, key: &DataKey) -> Self {
        Self { xts: engine.expand(key) }
    }

    /// The engine that the key was expanded for.
    pub const fn engine(&self) -> Engine {
        self.xts.engine()
    }

    /// Encrypts whole data units in place, the first of which is unit `first` of the volume.
    ///
    /// # Panics
    /// If the length of `data` is not a multiple of 4096.
    pub fn seal(&self, first: Lba, data: &mut [u8]) {
        assert!(data.len().is_multiple_of(UNIT_BYTES), "whole data units only");
        self.xts.encrypt(UNIT_BYTES, u128::from(first.0), data);
    }

    /// Decrypts whole data units in place, the first of which is unit `first` of the volume.
    ///
    /// Zero rule: a 512-byte sector whose ciphertext is all zero opens to zeros.
    ///
    /// # Panics
    /// If the length of `data` is not a multiple of 4096.
    pub fn open(&self, first: Lba, data: &mut [u8]) {
        assert!(data.len().is_multiple_of(UNIT_BYTES), "whole data units only");
        self.xts.decrypt(UNIT_BYTES, u128::from(first.0), data);
    }

    /// The engine of [`VolumeCipher::new`], for logs and status.
    pub fn engine_name() -> &'static str {
        Engine::preferred().description()
    }
}

impl fmt::Debug for VolumeCipher {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("VolumeCipher(redacted)")
    }
}

#[cfg(test)]
mod tests {
    use aes::Aes256;
    use aes::cipher::{Array, KeyInit};
    use proptest::prelude::*;
    use xts_mode::{Xts128, get_tweak_default};

    use super::*;

    const KEY: [u8; 64] = {
        let mut bytes = [7; 64];
        bytes[63] = 8;
        bytes
    };

    fn cipher() -> VolumeCipher {
        VolumeCipher::new(&DataKey::from_random(KEY).unwrap())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn sealed_requests_equal_the_oracle_and_open_again(
            first in any::<u64>(),
            units in 0_usize..6,
            seed in prop::collection::vec(any::<u8>(), 1..40),
        ) {
            let plain: Vec<u8> = seed.iter().copied().cycle().take(units * UNIT_BYTES).collect();
            let mut data = plain.clone();
            cipher().seal(Lba(first), &mut data);
            let (data_key, tweak_key) = KEY.split_at(32);
            let half = |bytes: &[u8]| Aes256::new(&Array(bytes.try_into().unwrap()));
            let mut expected = plain.clone();
            Xts128::new(half(data_key), half(tweak_key)).encrypt_area(
                &mut expected,
                UNIT_BYTES,
                u128::from(first),
                get_tweak_default,
            );
            prop_assert!(data == expected);
            cipher().open(Lba(first), &mut data);
            prop_assert!(data == plain);
        }

        #[test]
        fn zero_sectors_open_to_zeros_and_the_others_to_what_was_sealed(
            first in any::<u64>(),
            zero in prop::collection::vec(any::<bool>(), 24),
        ) {
            let plain = vec![0xa5; zero.len() * 512];
            let mut data = plain.clone();
            cipher().seal(Lba(first), &mut data);
            for (sector, _) in data.chunks_mut(512).zip(&zero).filter(|(_, zero)| **zero) {
                sector.fill(0);
            }
            cipher().open(Lba(first), &mut data);
            for (sector, zero) in data.chunks(512).zip(&zero) {
                let expected = if *zero { 0 } else { 0xa5 };
                prop_assert!(sector.iter().all(|byte| *byte == expected));
            }
        }
    }

    #[test]
    fn a_sector_that_only_starts_with_zeros_is_deciphered() {
        let mut data = vec![0; UNIT_BYTES];
        data[511] = 1;
        cipher().open(Lba(3), &mut data);
        assert!(data[..512].iter().any(|byte| *byte != 0));
        assert!(data[512..].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn zeros_are_sealed_like_any_other_data() {
        let mut data = vec![0; UNIT_BYTES];
        cipher().seal(Lba(0), &mut data);
        assert!(data.chunks(16).all(|block| block.iter().any(|byte| *byte != 0)));
    }

    #[test]
    #[should_panic(expected = "whole data units only")]
    fn part_of_a_data_unit_is_refused() {
        cipher().seal(Lba(0), &mut [0; 512]);
    }

    #[test]
    fn debug_output_shows_no_key() {
        assert_eq!(format!("{:?}", cipher()), "VolumeCipher(redacted)");
    }
}
