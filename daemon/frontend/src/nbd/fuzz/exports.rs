//! The exports that fuzzing meets.

use block::{ByteCount, VolumeId};

use super::super::{ExportDirectory, ExportInfo, ExportRefusal};

/// Small, so that offsets near the end come up.
pub(crate) const SMALL_BYTES: u64 = 1 << 20;
/// Large enough for requests of every length.
pub(crate) const HUGE_BYTES: u64 = 1 << 40;

/// An export of every kind, as a client sees them in clear text or over TLS.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Exports {
    pub(crate) tls: bool,
}

impl ExportDirectory for Exports {
    fn list(&self) -> Vec<String> {
        let names = ["disk", "frozen", "huge", "replica", "private", "secret"];
        let shown = if self.tls { names.len() } else { 4 };
        names.iter().take(shown).map(|name| (*name).to_owned()).collect()
    }

    fn find(&self, name: &str) -> Result<ExportInfo, ExportRefusal> {
        assert!(!name.is_empty(), "the default export is resolved before");
        let export = |number: u8, size, read_only| {
            Ok(ExportInfo {
                volume: VolumeId::from_bytes([number; 16]),
                size: ByteCount(size),
                read_only,
                description: Some("a disk".to_owned()),
            })
        };
        match name {
            "disk" => export(0, SMALL_BYTES, false),
            "frozen" => export(1, SMALL_BYTES, true),
            "huge" => export(2, HUGE_BYTES, false),
            "secret" if self.tls => export(3, SMALL_BYTES, false),
            "secret" => Err(ExportRefusal::TlsRequired),
            "private" => Err(ExportRefusal::Denied { reason: "volume 'private' is not for you".to_owned() }),
            "replica" => {
                Err(ExportRefusal::NotPresented { reason: "volume 'replica' is a secondary".to_owned() })
            }
            _ => Err(ExportRefusal::Unknown),
        }
    }
}
