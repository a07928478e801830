//! The only module with `unsafe` code: anonymous memory and the kernel's side of io_uring.
//!
//! What it exports is safe to use in any way: a [`memory::Block`] owns its bytes alone, and a [`kernel::Kernel`]
//! keeps whatever it lent the kernel until the completion arrived.
#![allow(unsafe_code)]

pub(crate) mod flight;
pub(crate) mod kernel;
pub(crate) mod memory;
