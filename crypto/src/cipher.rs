//! A volume's cipher.

use std::fmt;

use aes::cipher::{Array, KeyInit};
use aes::{Aes256, Aes256Enc};
use block::{DATA_UNIT_BYTES, Lba};

use crate::DataKey;
use crate::xts::Xts;

/// Bytes in one data unit.
const UNIT_BYTES: usize = 4096;
const _: () = assert!(DATA_UNIT_BYTES == 4096);

/// XTS-AES-256 under one volume's data key.
///
/// Data units are 4096 bytes; the tweak of a unit is its number in the volume as a 128-bit little-endian
/// integer (IEEE 1619-2007 section 5.1). That is dm-crypt's `aes-xts-plain64` with `sector_size:4096` and
/// `iv_large_sectors`.
pub struct VolumeCipher {
    engine: Xts,
}

impl VolumeCipher {
    /// Expands the key's two halves.
    pub fn new(key: &DataKey) -> Self {
        let (data, tweak) = key.halves();
        Self { engine: Xts::new(Aes256::new(&Array(*data)), Aes256Enc::new(&Array(*tweak))) }
    }

    /// Encrypts whole data units in place, the first of which is unit `first` of the volume.
    ///
    /// # Panics
    /// If the length of `data` is not a multiple of 4096.
    pub fn seal(&self, first: Lba, data: &mut [u8]) {
        assert!(data.len().is_multiple_of(UNIT_BYTES), "whole data units only");
        self.engine.encrypt(UNIT_BYTES, first.0, data);
    }

    /// Decrypts whole data units in place, the first of which is unit `first` of the volume.
    ///
    /// Zero rule: a 512-byte sector whose ciphertext is all zero opens to zeros.
    ///
    /// # Panics
    /// If the length of `data` is not a multiple of 4096.
    pub fn open(&self, first: Lba, data: &mut [u8]) {
        assert!(data.len().is_multiple_of(UNIT_BYTES), "whole data units only");
        self.engine.decrypt(UNIT_BYTES, first.0, data);
    }

    /// What does the work, for logs and measurements.
    pub fn engine_name() -> &'static str {
        if aes::hardware_accelerated() { "rustcrypto" } else { "rustcrypto-software" }
    }
}

impl fmt::Debug for VolumeCipher {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("VolumeCipher(redacted)")
    }
}

#[cfg(test)]
mod tests {
    use aes::cipher::Array;
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
