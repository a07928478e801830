//! The protocol's fixed-size structures and numbers, as they stand on the wire.

use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

pub(super) const NBD_MAGIC: u64 = u64::from_be_bytes(*b"NBDMAGIC");
pub(super) const OPTION_MAGIC: u64 = u64::from_be_bytes(*b"IHAVEOPT");
pub(super) const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
pub(super) const REQUEST_MAGIC: u32 = 0x2560_9513;
pub(super) const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
pub(super) const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
pub(super) const CHUNK_MAGIC: u32 = 0x668e_33ef;
pub(super) const EXTENDED_CHUNK_MAGIC: u32 = 0x6e8a_278c;

/// Flags of the greeting and of the client's answer; both sides number them alike.
pub(super) mod handshake_flag {
    pub(crate) const FIXED_NEWSTYLE: u16 = 1 << 0;
    pub(crate) const NO_ZEROES: u16 = 1 << 1;
}

/// Flags that describe an export.
pub(super) mod transmission_flag {
    pub(crate) const HAS_FLAGS: u16 = 1 << 0;
    pub(crate) const READ_ONLY: u16 = 1 << 1;
    pub(crate) const SEND_FLUSH: u16 = 1 << 2;
    pub(crate) const SEND_FUA: u16 = 1 << 3;
    pub(crate) const SEND_TRIM: u16 = 1 << 5;
    pub(crate) const SEND_WRITE_ZEROES: u16 = 1 << 6;
    pub(crate) const SEND_DF: u16 = 1 << 7;
    pub(crate) const CAN_MULTI_CONN: u16 = 1 << 8;
    pub(crate) const SEND_CACHE: u16 = 1 << 10;
    pub(crate) const SEND_FAST_ZERO: u16 = 1 << 11;
    pub(crate) const BLOCK_STATUS_PAYLOAD: u16 = 1 << 12;
}

/// Option numbers.
pub(super) mod option {
    pub(crate) const EXPORT_NAME: u32 = 1;
    pub(crate) const ABORT: u32 = 2;
    pub(crate) const LIST: u32 = 3;
    pub(crate) const STARTTLS: u32 = 5;
    pub(crate) const INFO: u32 = 6;
    pub(crate) const GO: u32 = 7;
    pub(crate) const STRUCTURED_REPLY: u32 = 8;
    pub(crate) const LIST_META_CONTEXT: u32 = 9;
    pub(crate) const SET_META_CONTEXT: u32 = 10;
    pub(crate) const EXTENDED_HEADERS: u32 = 11;
}

/// Option reply types.
pub(super) mod option_reply {
    pub(crate) const ACK: u32 = 1;
    pub(crate) const SERVER: u32 = 2;
    pub(crate) const INFO: u32 = 3;
    pub(crate) const META_CONTEXT: u32 = 4;
    pub(crate) const ERR_UNSUP: u32 = (1 << 31) + 1;
    pub(crate) const ERR_POLICY: u32 = (1 << 31) + 2;
    pub(crate) const ERR_INVALID: u32 = (1 << 31) + 3;
    pub(crate) const ERR_TLS_REQD: u32 = (1 << 31) + 5;
    pub(crate) const ERR_UNKNOWN: u32 = (1 << 31) + 6;
    pub(crate) const ERR_TOO_BIG: u32 = (1 << 31) + 9;
    pub(crate) const ERR_EXT_HEADER_REQD: u32 = (1 << 31) + 10;
}

/// Types of information about an export.
pub(super) mod info {
    pub(crate) const EXPORT: u16 = 0;
    pub(crate) const NAME: u16 = 1;
    pub(crate) const DESCRIPTION: u16 = 2;
    pub(crate) const BLOCK_SIZE: u16 = 3;
}

/// The one metadata context.
pub(super) mod context {
    pub(crate) const BASE_ALLOCATION: &str = "base:allocation";
    /// All contexts of the `base` namespace, where contexts are listed.
    pub(crate) const BASE_ALL: &str = "base:";
    /// What the server calls the context in status replies; any number would do.
    pub(crate) const BASE_ALLOCATION_ID: u32 = 1;
    /// The extent reads as zeros.
    pub(crate) const STATE_ZERO: u32 = 1 << 1;
}

/// Request types.
pub(super) mod command {
    pub(crate) const READ: u16 = 0;
    pub(crate) const WRITE: u16 = 1;
    pub(crate) const DISCONNECT: u16 = 2;
    pub(crate) const FLUSH: u16 = 3;
    pub(crate) const TRIM: u16 = 4;
    pub(crate) const CACHE: u16 = 5;
    pub(crate) const WRITE_ZEROES: u16 = 6;
    pub(crate) const BLOCK_STATUS: u16 = 7;
}

/// Request flags.
pub(super) mod command_flag {
    pub(crate) const FUA: u16 = 1 << 0;
    pub(crate) const NO_HOLE: u16 = 1 << 1;
    pub(crate) const DF: u16 = 1 << 2;
    pub(crate) const REQ_ONE: u16 = 1 << 3;
    pub(crate) const FAST_ZERO: u16 = 1 << 4;
    pub(crate) const PAYLOAD_LEN: u16 = 1 << 5;
}

/// Structured reply chunk types, and the flag that marks the last chunk.
pub(super) mod chunk {
    pub(crate) const FLAG_DONE: u16 = 1 << 0;
    pub(crate) const NONE: u16 = 0;
    pub(crate) const OFFSET_DATA: u16 = 1;
    pub(crate) const OFFSET_HOLE: u16 = 2;
    pub(crate) const BLOCK_STATUS: u16 = 5;
    pub(crate) const BLOCK_STATUS_EXT: u16 = 6;
    pub(crate) const ERROR: u16 = (1 << 15) + 1;
}

macro_rules! wire {
    ($($(#[$doc:meta])* struct $name:ident = $bytes:literal { $($field:ident: $type:ty,)* })*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
        #[repr(C)]
        pub(super) struct $name { $(pub(super) $field: $type,)* }
        const _: () = assert!(size_of::<$name>() == $bytes);
    )*};
}

wire! {
    /// The server's first words.
    struct Greeting = 18 {
        magic: U64,
        option_magic: U64,
        flags: U16,
    }
    struct OptionHeader = 16 {
        magic: U64,
        option: U32,
        length: U32,
    }
    struct OptionReplyHeader = 20 {
        magic: U64,
        option: U32,
        kind: U32,
        length: U32,
    }
    struct InfoExport = 12 {
        kind: U16,
        size: U64,
        flags: U16,
    }
    struct InfoBlockSize = 14 {
        kind: U16,
        minimum: U32,
        preferred: U32,
        payload_max: U32,
    }
    /// The answer to EXPORT_NAME, before the optional zeros.
    struct ExportNameReply = 10 {
        size: U64,
        flags: U16,
    }
    struct RequestHeader = 28 {
        magic: U32,
        flags: U16,
        kind: U16,
        cookie: U64,
        offset: U64,
        length: U32,
    }
    struct ExtendedRequestHeader = 32 {
        magic: U32,
        flags: U16,
        kind: U16,
        cookie: U64,
        offset: U64,
        length: U64,
    }
    /// The payload of a status request that names one context.
    struct StatusPayload = 12 {
        length: U64,
        context: U32,
    }
    struct SimpleReply = 16 {
        magic: U32,
        error: U32,
        cookie: U64,
    }
    struct ChunkHeader = 20 {
        magic: U32,
        flags: U16,
        kind: U16,
        cookie: U64,
        length: U32,
    }
    struct ExtendedChunkHeader = 32 {
        magic: U32,
        flags: U16,
        kind: U16,
        cookie: U64,
        offset: U64,
        length: U64,
    }
    struct HoleBody = 12 {
        offset: U64,
        length: U32,
    }
    struct ErrorBody = 6 {
        error: U32,
        text_length: U16,
    }
    struct StatusBody = 4 {
        context: U32,
    }
    struct StatusDescriptor = 8 {
        length: U32,
        flags: U32,
    }
    struct ExtendedStatusBody = 8 {
        context: U32,
        count: U32,
    }
    struct ExtendedStatusDescriptor = 16 {
        length: U64,
        flags: U64,
    }
}
