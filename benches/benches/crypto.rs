//! XTS seal and open of every engine at 4, 16 and 128 KiB, beside xts-mode on the same AES, and CRC-32C.
#![allow(missing_docs, reason = "criterion's macros make undocumented items")]

use std::hint::black_box;

use aes::Aes256;
use aes::cipher::KeyInit;
use block::Lba;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use crypto::{DataKey, Engine, VolumeCipher};
use xts_mode::{Xts128, get_tweak_default};

const KIB: usize = 1024;
const UNIT_BYTES: usize = 4 * KIB;
const FIRST_UNIT: Lba = Lba(1_000_003);

/// The 64 key bytes 0, 1, 2 and so on.
fn key_bytes() -> [u8; 64] {
    let mut bytes = [0; 64];
    bytes.iter_mut().zip(0..).for_each(|(byte, value)| *byte = value);
    bytes
}

fn volume_cipher(engine: Engine) -> Option<VolumeCipher> {
    DataKey::from_random(key_bytes()).ok().map(|key| VolumeCipher::with_engine(engine, &key))
}

fn xts_mode_cipher() -> Xts128<Aes256> {
    let mut halves = [[0; 32]; 2];
    halves.as_flattened_mut().copy_from_slice(&key_bytes());
    let [data, tweak] = halves.map(|half| Aes256::new(&half.into()));
    Xts128::new(data, tweak)
}

/// Measures `work` on a buffer of each size. The content is never zero, so the zero rule takes its usual path.
fn measure(criterion: &mut Criterion, group: &str, engine: &str, mut work: impl FnMut(&mut [u8])) {
    let mut group = criterion.benchmark_group(group);
    for length in [UNIT_BYTES, 16 * KIB, 128 * KIB] {
        let mut data = vec![0x5a; length];
        group.throughput(Throughput::Bytes(u64::try_from(length).unwrap_or(u64::MAX)));
        group.bench_with_input(BenchmarkId::new(engine, length / KIB), &length, |bencher, _| {
            bencher.iter(|| work(black_box(&mut data)));
        });
    }
    group.finish();
}

fn xts(criterion: &mut Criterion) {
    for engine in Engine::COMPILED {
        if let Some(cipher) = volume_cipher(*engine) {
            measure(criterion, "seal", engine.name(), |data| cipher.seal(FIRST_UNIT, data));
            measure(criterion, "open", engine.name(), |data| cipher.open(FIRST_UNIT, data));
        }
    }
    let oracle = xts_mode_cipher();
    let first = u128::from(FIRST_UNIT.0);
    measure(criterion, "seal", "xts-mode", |data| {
        oracle.encrypt_area(data, UNIT_BYTES, first, get_tweak_default);
    });
    measure(criterion, "open", "xts-mode", |data| {
        oracle.decrypt_area(data, UNIT_BYTES, first, get_tweak_default);
    });
}

fn crc(criterion: &mut Criterion) {
    measure(criterion, "checksum", "crc32c", |data| {
        black_box(crc32c::crc32c(data));
    });
}

criterion_group!(benches, xts, crc);
criterion_main!(benches);
