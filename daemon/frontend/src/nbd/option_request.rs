//! The data of a client's options: text and numbers from outside, parsed or refused.

use super::STRING_BYTES_MAX;
use super::layout::{info, option};

/// The options by what the server does with them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum OptionKind {
    ExportName,
    Abort,
    List,
    Info,
    Go,
    StructuredReply,
    /// Consumed and answered with ERR_UNSUP.
    Unserved,
}

impl OptionKind {
    pub(super) const fn from_number(number: u32) -> Self {
        match number {
            option::EXPORT_NAME => Self::ExportName,
            option::ABORT => Self::Abort,
            option::LIST => Self::List,
            option::INFO => Self::Info,
            option::GO => Self::Go,
            option::STRUCTURED_REPLY => Self::StructuredReply,
            _ => Self::Unserved,
        }
    }

    /// True if the option's data decides the answer; other data is dropped as it comes.
    pub(super) const fn reads_data(self) -> bool {
        match self {
            Self::ExportName | Self::Info | Self::Go => true,
            Self::Abort | Self::List | Self::StructuredReply | Self::Unserved => false,
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

pub(super) fn parse_export_request(data: &[u8]) -> Result<ExportRequest<'_>, OptionFault> {
    let (name_length, rest) = data.split_first_chunk::<4>().ok_or(OptionFault::Lengths)?;
    let name_length = usize::try_from(u32::from_be_bytes(*name_length)).map_err(|_| OptionFault::Lengths)?;
    let (name, rest) = rest.split_at_checked(name_length).ok_or(OptionFault::Lengths)?;
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

pub(super) fn parse_name(data: &[u8]) -> Result<&str, OptionFault> {
    if data.len() > STRING_BYTES_MAX {
        return Err(OptionFault::NameTooLong);
    }
    match str::from_utf8(data) {
        Ok(name) if !name.contains('\0') => Ok(name),
        Ok(_) | Err(_) => Err(OptionFault::NameNotText),
    }
}
