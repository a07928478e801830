//! The XTS engines and the choice between them.

use std::fmt;
use std::str::FromStr;

use crate::DataKey;
#[cfg(feature = "aws-lc")]
use crate::aws_lc::AwsLc;
use crate::guard::guard;
use crate::rust_crypto::RustCrypto;

/// What does XTS. All engines give the same ciphertext.
///
/// Which exist depends on the build: `aws-lc` is a cargo feature.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// Safe code over the crate `aes`.
    RustCrypto,
    /// The assembly of AWS-LC.
    #[cfg(feature = "aws-lc")]
    AwsLc,
}

/// Why there is no engine of that name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EngineError {
    /// This build does not have it.
    #[error("the encryption engine {name} is not part of this build, which has: {}", Engine::names())]
    NotCompiled {
        /// The engine's name.
        name: &'static str,
    },
    /// No build has it.
    #[error("there is no encryption engine of that name: this build has: {}", Engine::names())]
    Unknown,
}

impl Engine {
    /// The engines of this build.
    pub const COMPILED: &[Self] = &[
        Self::RustCrypto,
        #[cfg(feature = "aws-lc")]
        Self::AwsLc,
    ];

    /// The engine that is used unless another is asked for.
    ///
    /// It is `aws-lc` where that is compiled in: it is ahead on every kind of CPU measured, with AVX-512, with VAES
    /// alone, with AES-NI alone and without AES instructions (docs/PERFORMANCE.md).
    pub const fn preferred() -> Self {
        #[cfg(feature = "aws-lc")]
        return Self::AwsLc;
        #[cfg(not(feature = "aws-lc"))]
        return Self::RustCrypto;
    }

    /// The name, as in settings and status.
    pub const fn name(self) -> &'static str {
        match self {
            Self::RustCrypto => "rustcrypto",
            #[cfg(feature = "aws-lc")]
            Self::AwsLc => "aws-lc",
        }
    }

    /// The name, and whether the work is done without AES instructions, which is some twenty times slower.
    pub fn description(self) -> &'static str {
        match (self, aes::hardware_accelerated()) {
            (Self::RustCrypto, true) => "rustcrypto",
            (Self::RustCrypto, false) => "rustcrypto-software",
            #[cfg(feature = "aws-lc")]
            (Self::AwsLc, true) => "aws-lc",
            #[cfg(feature = "aws-lc")]
            (Self::AwsLc, false) => "aws-lc-software",
        }
    }

    fn names() -> String {
        Self::COMPILED.iter().map(|engine| engine.name()).collect::<Vec<_>>().join(", ")
    }

    /// Expands a key for this engine.
    pub(crate) fn expand(self, key: &DataKey) -> Xts {
        match self {
            Self::RustCrypto => {
                let expanded = Box::new(RustCrypto::new(key));
                guard(std::ptr::from_ref(&*expanded).cast(), size_of::<RustCrypto>());
                Xts::RustCrypto(expanded)
            }
            #[cfg(feature = "aws-lc")]
            Self::AwsLc => Xts::AwsLc(AwsLc::new(key)),
        }
    }
}

impl fmt::Display for Engine {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}

impl FromStr for Engine {
    type Err = EngineError;

    fn from_str(name: &str) -> Result<Self, EngineError> {
        match name {
            "rustcrypto" => Ok(Self::RustCrypto),
            #[cfg(feature = "aws-lc")]
            "aws-lc" => Ok(Self::AwsLc),
            #[cfg(not(feature = "aws-lc"))]
            "aws-lc" => Err(EngineError::NotCompiled { name: "aws-lc" }),
            _ => Err(EngineError::Unknown),
        }
    }
}

/// A key expanded for one of the engines.
///
/// A data unit is a multiple of 16 bytes, at most 4096; its tweak is its number as a 128-bit little-endian integer.
pub(crate) enum Xts {
    RustCrypto(Box<RustCrypto>),
    #[cfg(feature = "aws-lc")]
    AwsLc(AwsLc),
}

impl Xts {
    pub(crate) const fn engine(&self) -> Engine {
        match self {
            Self::RustCrypto(_) => Engine::RustCrypto,
            #[cfg(feature = "aws-lc")]
            Self::AwsLc(_) => Engine::AwsLc,
        }
    }

    /// Encrypts whole data units in place, the first of which has number `first_unit`.
    pub(crate) fn encrypt(&self, unit_bytes: usize, first_unit: u128, data: &mut [u8]) {
        match self {
            Self::RustCrypto(key) => key.encrypt(unit_bytes, first_unit, data),
            #[cfg(feature = "aws-lc")]
            Self::AwsLc(key) => key.encrypt(unit_bytes, first_unit, data),
        }
    }

    /// Decrypts whole data units in place, by the zero rule.
    pub(crate) fn decrypt(&self, unit_bytes: usize, first_unit: u128, data: &mut [u8]) {
        match self {
            Self::RustCrypto(key) => key.decrypt(unit_bytes, first_unit, data),
            #[cfg(feature = "aws-lc")]
            Self::AwsLc(key) => key.decrypt(unit_bytes, first_unit, data),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use xts_mode::get_tweak_default;

    use super::*;
    use crate::oracle::{bytes, key, noise, oracle};

    /// The lines of a vector file, in fields.
    fn vectors<const FIELDS: usize>(file: &str) -> impl Iterator<Item = [&str; FIELDS]> {
        let lines = file.lines().filter(|line| !line.starts_with('#'));
        lines.map(|line| line.split(' ').collect::<Vec<_>>().try_into().unwrap())
    }

    #[test]
    fn ieee_1619_vectors_match_both_ways() {
        let plain: Vec<u8> = (0..=255).chain(0..=255).collect();
        for engine in Engine::COMPILED {
            let xts = engine.expand(&key());
            let mut count = 0;
            for [name, unit, sealed] in vectors(include_str!("vectors/ieee1619.txt")) {
                let unit = u128::from_str_radix(unit, 16).unwrap();
                let mut data = plain.clone();
                xts.encrypt(512, unit, &mut data);
                assert_eq!(data, bytes(sealed), "{engine}, vector {name}");
                xts.decrypt(512, unit, &mut data);
                assert_eq!(data, plain, "{engine}, vector {name}");
                count += 1;
            }
            assert_eq!(count, 5);
        }
    }

    #[test]
    fn cavp_vectors_match_both_ways() {
        for engine in Engine::COMPILED {
            let mut count = 0;
            for [key, tweak, plain, sealed] in vectors(include_str!("vectors/cavp.txt")) {
                let key: [u8; 64] = bytes(key).try_into().unwrap();
                let xts = engine.expand(&DataKey::from_random(key).unwrap());
                let unit = u128::from_le_bytes(bytes(tweak).try_into().unwrap());
                let mut data = bytes(plain);
                let length = data.len();
                xts.encrypt(length, unit, &mut data);
                assert_eq!(data, bytes(sealed), "{engine}, vector {count}");
                xts.decrypt(length, unit, &mut data);
                assert_eq!(data, bytes(plain), "{engine}, vector {count}");
                count += 1;
            }
            assert_eq!(count, 1200);
        }
    }

    #[test]
    fn requests_that_cross_the_bounds_of_batches_equal_the_oracle() {
        for engine in Engine::COMPILED {
            let xts = engine.expand(&key());
            for unit_bytes in [512, 1024, 4096] {
                for units in (0..9).chain([31, 63, 64, 65, 127, 130]) {
                    let first = u128::from(u64::MAX - 40);
                    let plain = noise(unit_bytes * units, 9);
                    let mut data = plain.clone();
                    let mut expected = plain.clone();
                    xts.encrypt(unit_bytes, first, &mut data);
                    oracle().encrypt_area(&mut expected, unit_bytes, first, get_tweak_default);
                    assert!(data == expected, "{engine}, {units} units of {unit_bytes} bytes");
                    xts.decrypt(unit_bytes, first, &mut data);
                    assert!(data == plain, "{engine}, {units} units of {unit_bytes} bytes");
                }
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn engines_equal_the_oracle_for_every_length_alignment_and_unit(
            unit_blocks in 1_usize..=256,
            units in 0_usize..20,
            first in any::<u128>(),
            offset in 0_usize..64,
            seed in any::<u64>(),
        ) {
            let unit_bytes = unit_blocks * 16;
            // The oracle's numbers do not wrap.
            let first = first >> 1;
            let plain = noise(offset + unit_bytes * units, seed);
            let mut expected = plain.clone();
            oracle().encrypt_area(&mut expected[offset..], unit_bytes, first, get_tweak_default);
            for engine in Engine::COMPILED {
                let xts = engine.expand(&key());
                let mut data = plain.clone();
                xts.encrypt(unit_bytes, first, &mut data[offset..]);
                prop_assert!(data == expected, "{engine} encrypts otherwise");
                xts.decrypt(unit_bytes, first, &mut data[offset..]);
                prop_assert!(data == plain, "{engine} decrypts otherwise");
            }
        }

        #[test]
        fn engines_agree_on_any_ciphertext_with_zeros_in_it(
            sectors in prop::collection::vec(0_u8..4, 24),
            first in any::<u64>(),
            seed in any::<u64>(),
        ) {
            let mut sealed = noise(sectors.len() * 512, seed);
            for (sector, kind) in sealed.chunks_mut(512).zip(&sectors) {
                match kind {
                    0 => sector.fill(0),
                    1 => sector[..511].fill(0),
                    2 => sector[8..].fill(0),
                    _ => {}
                }
            }
            let mut expected = sealed.clone();
            oracle().decrypt_area(&mut expected, 4096, u128::from(first), get_tweak_default);
            for (opened, sealed) in expected.chunks_mut(512).zip(sealed.chunks(512)) {
                if sealed.iter().all(|byte| *byte == 0) {
                    opened.fill(0);
                }
            }
            for engine in Engine::COMPILED {
                let mut data = sealed.clone();
                engine.expand(&key()).decrypt(4096, u128::from(first), &mut data);
                prop_assert!(data == expected, "{engine}");
            }
        }
    }

    #[test]
    fn threads_share_an_expanded_key() {
        for engine in Engine::COMPILED {
            let xts = engine.expand(&key());
            std::thread::scope(|scope| {
                for thread in 0..4 {
                    let xts = &xts;
                    scope.spawn(move || {
                        for round in 0..200 {
                            let first = thread * 1000 + round;
                            let plain = noise(8192, 1);
                            let mut data = plain.clone();
                            xts.encrypt(4096, first, &mut data);
                            let mut expected = plain.clone();
                            if round % 50 == 0 {
                                oracle().encrypt_area(&mut expected, 4096, first, get_tweak_default);
                                assert!(data == expected, "{engine}");
                            }
                            xts.decrypt(4096, first, &mut data);
                            assert!(data == plain, "{engine}");
                        }
                    });
                }
            });
        }
    }

    #[test]
    fn names_lead_back_to_engines() {
        for engine in Engine::COMPILED {
            assert_eq!(engine.name().parse(), Ok(*engine));
        }
        assert_eq!("openssl".parse::<Engine>(), Err(EngineError::Unknown));
        assert!(Engine::COMPILED.contains(&Engine::preferred()));
    }
}
