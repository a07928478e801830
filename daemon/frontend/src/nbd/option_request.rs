//! The data of a client's options: text and numbers from outside, parsed or refused.

use super::STRING_BYTES_MAX;
use super::layout::{context, info, option};

/// The options by what the server does with them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum OptionKind {
    ExportName,
    Abort,
    List,
    StartTls,
    Info,
    Go,
    StructuredReply,
    ListMetaContext,
    SetMetaContext,
    ExtendedHeaders,
    /// Consumed and answered with ERR_UNSUP.
    Unserved,
}

impl OptionKind {
    pub(super) const fn from_number(number: u32) -> Self {
        match number {
            option::EXPORT_NAME => Self::ExportName,
            option::ABORT => Self::Abort,
            option::LIST => Self::List,
            option::STARTTLS => Self::StartTls,
            option::INFO => Self::Info,
            option::GO => Self::Go,
            option::STRUCTURED_REPLY => Self::StructuredReply,
            option::LIST_META_CONTEXT => Self::ListMetaContext,
            option::SET_META_CONTEXT => Self::SetMetaContext,
            option::EXTENDED_HEADERS => Self::ExtendedHeaders,
            _ => Self::Unserved,
        }
    }

    /// True if the option's data decides the answer; other data is dropped as it comes.
    pub(super) const fn reads_data(self) -> bool {
        match self {
            Self::ExportName | Self::Info | Self::Go | Self::ListMetaContext | Self::SetMetaContext => true,
            Self::Abort
            | Self::List
            | Self::StartTls
            | Self::StructuredReply
            | Self::ExtendedHeaders
            | Self::Unserved => false,
        }
    }

    /// True if the option must come without data.
    pub(super) const fn refuses_data(self) -> bool {
        match self {
            Self::List | Self::StartTls | Self::StructuredReply | Self::ExtendedHeaders => true,
            Self::ExportName
            | Self::Abort
            | Self::Info
            | Self::Go
            | Self::ListMetaContext
            | Self::SetMetaContext
            | Self::Unserved => false,
        }
    }
}

/// What is wrong with an option's data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OptionFault {
    /// The lengths inside do not add up to the option's length.
    #[error("the option's lengths do not match")]
    Lengths,
    /// The option takes no data.
    #[error("the option takes no data")]
    UnexpectedData,
    /// The export name is longer than the protocol allows.
    #[error("the export name is longer than 4096 bytes")]
    NameTooLong,
    /// The export name is not UTF-8, or has a NUL.
    #[error("the export name is not UTF-8 text")]
    NameNotText,
    /// A query for metadata contexts is longer than the protocol allows, is not UTF-8, has a NUL or lacks the colon.
    #[error("a query is not of the form namespace:leaf")]
    Query,
}

/// Which pieces of information a client asked for; unknown ones are ignored, as the specification has it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct WantedInfo {
    pub(super) name: bool,
    pub(super) description: bool,
    pub(super) block_size: bool,
}

/// The data of INFO and GO.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ExportRequest<'data> {
    pub(super) name: &'data str,
    pub(super) wanted: WantedInfo,
}

/// The data of LIST_META_CONTEXT and SET_META_CONTEXT, by what matters of its queries: there is one context.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ContextRequest<'data> {
    pub(super) name: &'data str,
    /// No query at all: a list then names everything.
    pub(super) is_bare: bool,
    /// A query names `base:allocation`.
    pub(super) exact: bool,
    /// A query names all of `base:`.
    pub(super) wildcard: bool,
}

pub(super) fn parse_export_request(data: &[u8]) -> Result<ExportRequest<'_>, OptionFault> {
    let (name, rest) = split_string(data)?;
    let (count, requests) = rest.split_first_chunk::<2>().ok_or(OptionFault::Lengths)?;
    let (requests, odd) = requests.as_chunks::<2>();
    if !odd.is_empty() || usize::from(u16::from_be_bytes(*count)) != requests.len() {
        return Err(OptionFault::Lengths);
    }
    let mut wanted = WantedInfo::default();
    for request in requests {
        match u16::from_be_bytes(*request) {
            info::NAME => wanted.name = true,
            info::DESCRIPTION => wanted.description = true,
            info::BLOCK_SIZE => wanted.block_size = true,
            _ => {}
        }
    }
    let name = parse_name(name)?;
    Ok(ExportRequest { name, wanted })
}

pub(super) fn parse_context_request(data: &[u8]) -> Result<ContextRequest<'_>, OptionFault> {
    let (name, rest) = split_string(data)?;
    let (count, mut rest) = rest.split_first_chunk::<4>().ok_or(OptionFault::Lengths)?;
    let count = u32::from_be_bytes(*count);
    let (mut exact, mut wildcard, mut is_text) = (false, false, true);
    // Each query takes four bytes at least, so the data's length bounds the loop, whatever the count says.
    for _ in 0..count {
        let (query, behind) = split_string(rest)?;
        rest = behind;
        is_text &= is_query(query);
        exact |= query == context::BASE_ALLOCATION.as_bytes();
        wildcard |= query == context::BASE_ALL.as_bytes();
    }
    if !rest.is_empty() {
        return Err(OptionFault::Lengths);
    }
    if !is_text {
        return Err(OptionFault::Query);
    }
    let name = parse_name(name)?;
    Ok(ContextRequest { name, is_bare: count == 0, exact, wildcard })
}

/// A string with its length before it, and what follows.
fn split_string(data: &[u8]) -> Result<(&[u8], &[u8]), OptionFault> {
    let (length, rest) = data.split_first_chunk::<4>().ok_or(OptionFault::Lengths)?;
    let length = usize::try_from(u32::from_be_bytes(*length)).map_err(|_| OptionFault::Lengths)?;
    rest.split_at_checked(length).ok_or(OptionFault::Lengths)
}

/// True if the query has a namespace; which leaves a namespace knows is its own affair.
fn is_query(query: &[u8]) -> bool {
    let text = str::from_utf8(query).unwrap_or_default();
    let namespace = text.split_once(':').map_or("", |(namespace, _)| namespace);
    query.len() <= STRING_BYTES_MAX && !namespace.is_empty() && !text.contains('\0')
}

pub(super) fn parse_name(data: &[u8]) -> Result<&str, OptionFault> {
    if data.len() > STRING_BYTES_MAX {
        return Err(OptionFault::NameTooLong);
    }
    match str::from_utf8(data) {
        Ok(name) if !name.contains('\0') => Ok(name),
        Ok(_) | Err(_) => Err(OptionFault::NameNotText),
    }
}
