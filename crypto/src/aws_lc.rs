//! The `aws-lc` engine: XTS by AWS-LC's assembly, through its EVP interface. The only `unsafe` of this crate.
//!
//! An EVP context holds a key of one direction and is changed by every data unit. A volume's cipher is shared
//! between threads, so each direction keeps a keyed context that only copies are made of, and one spare copy that
//! a request takes for its time. Requests that come while the spare is taken work on a copy of their own. A copy for
//! every request would cost 80 ns, a tenth of the speed at 4 KiB.
#![allow(unsafe_code, reason = "calls of a C library")]

use std::ffi::c_int;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicPtr, Ordering};

use aws_lc_sys::{
    EVP_CIPHER_CTX, EVP_CIPHER_CTX_copy, EVP_CIPHER_CTX_free, EVP_CIPHER_CTX_new, EVP_Cipher,
    EVP_CipherInit_ex, EVP_aes_256_xts,
};

use crate::DataKey;
use crate::guard::guard;
use crate::zero;

/// Bytes in one AES block.
const BLOCK_BYTES: usize = 16;
/// Of the data of XTS-AES-256 at least so much is expanded keys: two of 15 rounds' keys each.
const EXPANDED_BYTES: usize = 2 * 15 * BLOCK_BYTES;
/// What a successful call returns.
const SUCCESS: c_int = 1;
/// The direction of a context stays as it is.
const SAME_DIRECTION: c_int = -1;

/// A data key expanded for use. AWS-LC zeroes what it frees.
pub(crate) struct AwsLc {
    encryption: Contexts,
    decryption: Contexts,
}

impl AwsLc {
    pub(crate) fn new(key: &DataKey) -> Self {
        Self {
            encryption: Contexts::new(Context::new(key, Direction::Encrypt)),
            decryption: Contexts::new(Context::new(key, Direction::Decrypt)),
        }
    }

    /// Encrypts `data` in place. `unit_bytes` is the length of a data unit, `first_unit` the first one's number.
    pub(crate) fn encrypt(&self, unit_bytes: usize, first_unit: u128, data: &mut [u8]) {
        self.encryption.for_each_unit(unit_bytes, first_unit, data, Context::transform);
    }

    /// Decrypts `data` in place, by the zero rule: an all-zero sector stays zero.
    pub(crate) fn decrypt(&self, unit_bytes: usize, first_unit: u128, data: &mut [u8]) {
        self.decryption.for_each_unit(unit_bytes, first_unit, data, |context, unit_number, unit| {
            let zero_sectors = zero::zero_sectors(unit);
            context.transform(unit_number, unit);
            if zero_sectors != 0 {
                zero::clear_sectors(unit, zero_sectors);
            }
        });
    }
}

/// The contexts of one direction.
struct Contexts {
    /// Never used but to be copied.
    keyed: Context,
    /// A copy that waits for the next request, or null.
    spare: AtomicPtr<EVP_CIPHER_CTX>,
}

impl Contexts {
    const fn new(keyed: Context) -> Self {
        Self { keyed, spare: AtomicPtr::new(ptr::null_mut()) }
    }

    fn for_each_unit(
        &self,
        unit_bytes: usize,
        first_unit: u128,
        data: &mut [u8],
        mut work: impl FnMut(&mut Context, u128, &mut [u8]),
    ) {
        assert!(unit_bytes >= BLOCK_BYTES && data.len().is_multiple_of(unit_bytes));
        let mut context = self.take_spare().unwrap_or_else(|| self.keyed.copy());
        let mut unit_number = first_unit;
        for unit in data.chunks_exact_mut(unit_bytes) {
            work(&mut context, unit_number, unit);
            unit_number = unit_number.wrapping_add(1);
        }
        self.put_spare(context);
    }

    fn take_spare(&self) -> Option<Context> {
        NonNull::new(self.spare.swap(ptr::null_mut(), Ordering::Acquire)).map(Context)
    }

    /// Keeps `context` for the next request; one that another thread put there meanwhile is freed.
    fn put_spare(&self, context: Context) {
        let pointer = context.0.as_ptr();
        std::mem::forget(context);
        drop(NonNull::new(self.spare.swap(pointer, Ordering::AcqRel)).map(Context));
    }
}

impl Drop for Contexts {
    fn drop(&mut self) {
        drop(self.take_spare());
    }
}

#[derive(Clone, Copy)]
enum Direction {
    Encrypt,
    Decrypt,
}

/// An EVP context of our own, always with cipher, key and direction set.
struct Context(NonNull<EVP_CIPHER_CTX>);

// SAFETY: a context is plain memory of the C heap, with no tie to the thread that made it.
unsafe impl Send for Context {}
// SAFETY: a shared context can only be copied, and copying an XTS context only reads it.
unsafe impl Sync for Context {}

impl Context {
    /// An empty context. Aborts like any allocation if there is no memory.
    fn empty() -> Self {
        // SAFETY: the call has no preconditions.
        let pointer = unsafe { EVP_CIPHER_CTX_new() };
        let pointer = NonNull::new(pointer);
        assert!(pointer.is_some(), "no memory for a cipher context");
        Self(pointer.unwrap_or(NonNull::dangling()))
    }

    fn new(key: &DataKey, direction: Direction) -> Self {
        let context = Self::empty();
        let key = key.concatenated();
        let encrypt = match direction {
            Direction::Encrypt => 1,
            Direction::Decrypt => 0,
        };
        // SAFETY: the call has no preconditions; what it returns lives as long as the program.
        let cipher = unsafe { EVP_aes_256_xts() };
        // SAFETY: the context is ours; XTS-AES-256 reads 64 bytes of key, which is what `key` has; no engine and no
        // tweak are allowed by the interface.
        let result = unsafe {
            EVP_CipherInit_ex(context.0.as_ptr(), cipher, ptr::null_mut(), key.as_ptr(), ptr::null(), encrypt)
        };
        // The halves of a `DataKey` differ, so only memory can be missing.
        assert!(result == SUCCESS, "no memory for a cipher context");
        context.guard_key();
        context
    }

    fn copy(&self) -> Self {
        let copy = Self::empty();
        // SAFETY: both are contexts, the copy is ours alone, and the original is only read.
        let result = unsafe { EVP_CIPHER_CTX_copy(copy.0.as_ptr(), self.0.as_ptr()) };
        assert!(result == SUCCESS, "no memory for a cipher context");
        copy.guard_key();
        copy
    }

    /// Tells where the expanded key lies.
    fn guard_key(&self) {
        // SAFETY: the context is valid and has its cipher, so that it has the cipher's data.
        let expanded = unsafe { (*self.0.as_ptr()).cipher_data };
        guard(expanded.cast_const().cast(), EXPANDED_BYTES);
    }

    /// XTS over one data unit in place, in the context's direction.
    fn transform(&mut self, unit_number: u128, unit: &mut [u8]) {
        let tweak = unit_number.to_le_bytes();
        // SAFETY: the context is ours alone and has its cipher and key; XTS reads 16 bytes of tweak. Without a key
        // the expanded one stays, so that this sets the tweak and nothing else.
        let result = unsafe {
            EVP_CipherInit_ex(
                self.0.as_ptr(),
                ptr::null(),
                ptr::null_mut(),
                ptr::null(),
                tweak.as_ptr(),
                SAME_DIRECTION,
            )
        };
        assert!(result == SUCCESS, "a tweak is always accepted");
        // SAFETY: the context is ours alone with key and tweak set; XTS reads and writes exactly `unit.len()` bytes,
        // and may do so in place.
        let result = unsafe { EVP_Cipher(self.0.as_ptr(), unit.as_mut_ptr(), unit.as_ptr(), unit.len()) };
        assert!(result == SUCCESS, "a data unit of 16 bytes to 16 MiB is always accepted");
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: the context is ours and not used again. The call zeroes the key before it frees it.
        unsafe { EVP_CIPHER_CTX_free(self.0.as_ptr()) };
    }
}
