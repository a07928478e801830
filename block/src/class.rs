//! Storage classes: IOPS per TiB, and the limit that follows for a volume.

use std::fmt;
use std::num::NonZeroU32;

use crate::ByteCount;

/// Bytes in one TiB.
pub const TIB: u64 = 1 << 40;

/// A volume's limit on host commands a second, over all its connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IopsLimit {
    /// No limit and no commitment.
    Unlimited,
    /// At most, and under saturating load no less than, this many a second.
    PerSecond(NonZeroU32),
}

/// A storage class: a name and its IOPS per TiB.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StorageClass {
    /// The class's name, as in `volume create --class NAME`.
    pub name: String,
    /// IOPS per TiB; `None` is without limit or commitment.
    pub iops_per_tib: Option<NonZeroU32>,
}

impl StorageClass {
    /// The classes that the daemon knows without settings.
    pub fn built_in() -> Vec<Self> {
        let class =
            |name: &str, iops: u32| Self { name: name.to_owned(), iops_per_tib: NonZeroU32::new(iops) };
        vec![
            class("essential", 500),
            class("standard", 1500),
            class("premium", 3000),
            class("enterprise", 7500),
            class("ultra", 15_000),
            class("archival", 0),
        ]
    }

    /// The limit of a volume of this class and size: class times size, rounded up, at least 1.
    pub fn limit(&self, size: ByteCount) -> IopsLimit {
        let Some(per_tib) = self.iops_per_tib else {
            return IopsLimit::Unlimited;
        };
        let product = u128::from(per_tib.get()) * u128::from(size.0);
        let limit = u32::try_from(product.div_ceil(u128::from(TIB))).unwrap_or(u32::MAX);
        NonZeroU32::new(limit).map_or(IopsLimit::PerSecond(NonZeroU32::MIN), IopsLimit::PerSecond)
    }
}

impl fmt::Display for IopsLimit {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unlimited => formatter.write_str("unlimited"),
            Self::PerSecond(limit) => limit.fmt(formatter),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limit(class: &str, size: u64) -> String {
        let classes = StorageClass::built_in();
        classes.iter().find(|known| known.name == class).unwrap().limit(ByteCount(size)).to_string()
    }

    #[test]
    fn limits_follow_class_and_size() {
        assert_eq!(limit("standard", TIB / 2), "750");
        assert_eq!(limit("ultra", 10 * TIB), "150000");
        assert_eq!(limit("archival", TIB), "unlimited");
        assert_eq!(limit("essential", 1 << 20), "1");
    }
}
