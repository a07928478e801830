//! What the tests compare the engines with: `xts-mode`, which shares no code with either but AES.

use aes::Aes256;
use aes::cipher::{Array, KeyInit};
use xts_mode::Xts128;

use crate::DataKey;

/// The key of IEEE 1619's vectors 10 to 14: data key, then tweak key.
const PI_AND_E: &str = "2718281828459045235360287471352662497757247093699959574966967627\
                        3141592653589793238462643383279502884197169399375105820974944592";

pub(crate) fn bytes(hexadecimal: &str) -> Vec<u8> {
    let digits = hexadecimal.as_bytes().chunks(2);
    let byte = |pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
    digits.map(byte).collect()
}

pub(crate) fn key() -> DataKey {
    let bytes: [u8; 64] = bytes(PI_AND_E).try_into().unwrap();
    DataKey::from_random(bytes).unwrap()
}

/// The two block ciphers of [`key`].
pub(crate) fn ciphers() -> [Aes256; 2] {
    let key = key();
    let (data, tweak) = key.halves();
    [data, tweak].map(|half| Aes256::new(&Array(*half)))
}

pub(crate) fn oracle() -> Xts128<Aes256> {
    let [data, tweak] = ciphers();
    Xts128::new(data, tweak)
}

/// Bytes that look random and are the same in every run.
pub(crate) fn noise(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state.to_be_bytes()[0]
    };
    (0..length).map(|_| next()).collect()
}
