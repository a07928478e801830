//! Who may open a volume, and how.
//!
//! A host is known by its *identity*, a text from its TLS certificate (docs/SECURITY.md says which). The rule of who is
//! let in is [`VolumeAccess::admit`]; it stands here so that the daemon has it once and whoever reads the API can
//! reproduce it.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The longest identity of a host, in bytes.
pub const HOST_IDENTITY_BYTES_MAX: usize = 128;
/// The most hosts in a volume's list.
pub const ACCESS_HOSTS_MAX: usize = 64;
/// The most bytes that a volume's list takes in the volume's header: each host's identity and two bytes.
pub const ACCESS_HOSTS_BYTES_MAX: usize = 1024;

/// What a host's certificate calls it: 1 to [`HOST_IDENTITY_BYTES_MAX`] bytes of text without control characters, and
/// without space at its ends.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct HostIdentity(String);

/// Why a text is no identity of a host.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "host identity '{}' is not allowed: use 1 to {HOST_IDENTITY_BYTES_MAX} bytes of text, as the common name in the host's certificate",
    .0.escape_debug()
)]
pub struct HostIdentityError(String);

impl HostIdentity {
    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for HostIdentity {
    type Error = HostIdentityError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        let fits = (1..=HOST_IDENTITY_BYTES_MAX).contains(&text.len());
        if !fits || text.trim() != text || text.chars().any(char::is_control) {
            return Err(HostIdentityError(text.chars().take(HOST_IDENTITY_BYTES_MAX).collect()));
        }
        Ok(Self(text))
    }
}

impl From<HostIdentity> for String {
    fn from(identity: HostIdentity) -> Self {
        identity.0
    }
}

impl FromStr for HostIdentity {
    type Err = HostIdentityError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::try_from(text.to_owned())
    }
}

impl fmt::Display for HostIdentity {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

/// A host in a volume's list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostAccess {
    /// Which host.
    pub identity: HostIdentity,
    /// True if it may only read.
    #[serde(default)]
    pub read_only: bool,
}

impl FromStr for HostAccess {
    type Err = HostIdentityError;

    /// Reads `IDENTITY`, `IDENTITY:ro` or `IDENTITY:rw`.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (identity, read_only) = match text.rsplit_once(':') {
            Some((identity, "ro")) => (identity, true),
            Some((identity, "rw")) => (identity, false),
            Some(_) | None => (text, false),
        };
        Ok(Self { identity: identity.parse()?, read_only })
    }
}

/// Who may open a volume. The default is every host that a listener lets in, with or without TLS.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeAccess {
    /// True if the volume can be opened over TLS only. A list of hosts implies it.
    pub tls_required: bool,
    /// True if no host may write.
    pub read_only: bool,
    /// The only hosts that may open it; if empty, any may. By identity, each once.
    pub hosts: Vec<HostAccess>,
}

/// What a connection shows of its host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Peer {
    /// True if the connection is protected by TLS.
    pub secured: bool,
    /// The identity in the host's verified certificate, if it has shown one.
    pub identity: Option<HostIdentity>,
}

/// How a connection may use a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    /// Read and write.
    ReadWrite,
    /// Read.
    ReadOnly,
}

/// Why a connection may not open a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AccessRefusal {
    /// It is not protected by TLS.
    #[error("it can be opened over TLS only: connect with nbds:// and try again")]
    TlsRequired,
    /// The volume names its hosts, and this one has shown no certificate.
    #[error(
        "it is open to named hosts only: connect with a client certificate that this site's client CA signed"
    )]
    NoIdentity,
    /// The volume names its hosts, and this one is not among them.
    #[error("it is open to named hosts only, and this one is not among them: ask the operator for access")]
    NotListed,
}

impl VolumeAccess {
    /// Whether this connection may open the volume, and how.
    ///
    /// # Errors
    /// [`AccessRefusal`] if it may not.
    pub fn admit(&self, peer: &Peer) -> Result<Admission, AccessRefusal> {
        if !peer.secured && (self.tls_required || !self.hosts.is_empty()) {
            return Err(AccessRefusal::TlsRequired);
        }
        let mut read_only = self.read_only;
        if !self.hosts.is_empty() {
            let identity = peer.identity.as_ref().ok_or(AccessRefusal::NoIdentity)?;
            let host = self.hosts.iter().find(|host| host.identity == *identity);
            read_only |= host.ok_or(AccessRefusal::NotListed)?.read_only;
        }
        Ok(if read_only { Admission::ReadOnly } else { Admission::ReadWrite })
    }

    /// True if a connection that was opened read-only, or not, may stay.
    pub fn permits(&self, peer: &Peer, read_only: bool) -> bool {
        match self.admit(peer) {
            Ok(Admission::ReadWrite) => true,
            Ok(Admission::ReadOnly) => read_only,
            Err(_) => false,
        }
    }

    /// Bytes that the list takes in the volume's header.
    pub fn hosts_bytes(&self) -> usize {
        self.hosts.iter().map(|host| host.identity.as_str().len() + 2).sum()
    }

    /// The access after a change: first `any_host` and `revoke`, then `allow`.
    ///
    /// # Errors
    /// What is revoked is not listed, the list would end empty by a revocation alone, or would be too long.
    pub fn changed(&self, change: &VolumeAccessChange) -> Result<Self, AccessChangeError> {
        let mut changed = self.clone();
        if change.any_host {
            changed.hosts.clear();
        }
        for identity in &change.revoke {
            let place = changed.hosts.iter().position(|host| host.identity == *identity);
            let place = place.ok_or_else(|| AccessChangeError::NotListed(identity.clone()))?;
            changed.hosts.remove(place);
        }
        for host in &change.allow {
            changed.hosts.retain(|listed| listed.identity != host.identity);
            changed.hosts.push(host.clone());
        }
        changed.hosts.sort_by(|one, other| one.identity.cmp(&other.identity));
        if changed.hosts.is_empty() && !self.hosts.is_empty() && !change.any_host {
            return Err(AccessChangeError::WouldOpen);
        }
        let bytes = changed.hosts_bytes();
        if changed.hosts.len() > ACCESS_HOSTS_MAX || bytes > ACCESS_HOSTS_BYTES_MAX {
            return Err(AccessChangeError::TooMany { hosts: changed.hosts.len(), bytes });
        }
        changed.read_only = change.read_only.unwrap_or(changed.read_only);
        changed.tls_required = match change.tls {
            Some(TlsRule::Required) => true,
            Some(TlsRule::Optional) if !changed.hosts.is_empty() => {
                return Err(AccessChangeError::NeedsTls);
            }
            Some(TlsRule::Optional) => false,
            // A list implied TLS; without it TLS stays until it is given up by name.
            None => changed.tls_required || (changed.hosts.is_empty() && !self.hosts.is_empty()),
        };
        Ok(changed)
    }
}

/// Whether a volume needs TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TlsRule {
    /// With or without, as the listener has it.
    Optional,
    /// Over TLS only.
    Required,
}

/// Body of `POST /v1/volumes/NAME/access`: what is not given stays.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct VolumeAccessChange {
    /// Whether the volume needs TLS.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls: Option<TlsRule>,
    /// Whether no host may write.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub read_only: Option<bool>,
    /// Hosts to add to the list, or to change in it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub allow: Vec<HostAccess>,
    /// Hosts to take from the list.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub revoke: Vec<HostIdentity>,
    /// Empty the list first, so that any host may open the volume if none is added.
    pub any_host: bool,
    /// Of a mirrored volume: shut out here what is to be shut out, also if the partner cannot be told now.
    pub here_first: bool,
}

/// Who may open a volume, and what is not as it should be with that.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeAccessView {
    /// Who may open it.
    #[serde(flatten)]
    pub access: VolumeAccess,
    /// That a mirror's partner has other rules still, as a sentence.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warning: Option<String>,
}

/// Why a change of a volume's access is refused; it reads on after "the access to volume 'NAME' stays as it is: ".
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AccessChangeError {
    /// The host is not in the list.
    #[error("host '{0}' is not in its list, see 'farshore volume access'")]
    NotListed(HostIdentity),
    /// Without its last host the list would let in all.
    #[error(
        "without its last listed host it would be open to every host; allow another host, or say --any-host if that is meant"
    )]
    WouldOpen,
    /// The list is too long.
    #[error(
        "the list would have {hosts} hosts in {bytes} bytes, allowed are {ACCESS_HOSTS_MAX} hosts in {ACCESS_HOSTS_BYTES_MAX} bytes (two more than its identity for each); use shorter or fewer identities"
    )]
    TooMany {
        /// How many hosts.
        hosts: usize,
        /// How many bytes.
        bytes: usize,
    },
    /// Named hosts are known by TLS only.
    #[error(
        "hosts are told apart by TLS, so a volume with a list of hosts needs it; empty the list with --any-host first"
    )]
    NeedsTls,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(text: &str) -> HostIdentity {
        text.parse().unwrap()
    }

    fn peer(secured: bool, name: Option<&str>) -> Peer {
        Peer { secured, identity: name.map(identity) }
    }

    fn access(hosts: &[&str]) -> VolumeAccess {
        let hosts = hosts.iter().map(|host| host.parse().unwrap()).collect();
        VolumeAccess { hosts, ..VolumeAccess::default() }
    }

    #[test]
    fn an_identity_is_a_short_text_without_control_characters() {
        for bad in ["", " a", "a ", "a\nb", "a\0", &"x".repeat(HOST_IDENTITY_BYTES_MAX + 1)] {
            assert!(bad.parse::<HostIdentity>().is_err(), "{bad:?}");
        }
        assert_eq!(identity("Häuser 1").as_str(), "Häuser 1");
        let refused = "a\nb".parse::<HostIdentity>().unwrap_err().to_string();
        assert_eq!(refused.lines().count(), 1);
    }

    #[test]
    fn a_host_is_given_with_or_without_its_mode() {
        for (text, name, read_only) in
            [("a", "a", false), ("a:ro", "a", true), ("a:rw", "a", false), ("urn:a:1", "urn:a:1", false)]
        {
            let host: HostAccess = text.parse().unwrap();
            assert_eq!((host.identity.as_str(), host.read_only), (name, read_only), "{text}");
        }
        assert!(":ro".parse::<HostAccess>().is_err());
    }

    #[test]
    fn without_a_list_any_host_is_admitted_and_with_one_only_those_in_it() {
        let open = VolumeAccess::default();
        assert_eq!(open.admit(&peer(false, None)), Ok(Admission::ReadWrite));
        let secured = VolumeAccess { tls_required: true, ..open.clone() };
        assert_eq!(secured.admit(&peer(false, None)), Err(AccessRefusal::TlsRequired));
        assert_eq!(secured.admit(&peer(true, None)), Ok(Admission::ReadWrite));
        let listed = access(&["a", "b:ro"]);
        assert_eq!(listed.admit(&peer(false, None)), Err(AccessRefusal::TlsRequired));
        assert_eq!(listed.admit(&peer(true, None)), Err(AccessRefusal::NoIdentity));
        assert_eq!(listed.admit(&peer(true, Some("c"))), Err(AccessRefusal::NotListed));
        assert_eq!(listed.admit(&peer(true, Some("A"))), Err(AccessRefusal::NotListed));
        assert_eq!(listed.admit(&peer(true, Some("a"))), Ok(Admission::ReadWrite));
        assert_eq!(listed.admit(&peer(true, Some("b"))), Ok(Admission::ReadOnly));
        let read_only = VolumeAccess { read_only: true, ..listed };
        assert_eq!(read_only.admit(&peer(true, Some("a"))), Ok(Admission::ReadOnly));
    }

    #[test]
    fn a_change_adds_replaces_and_removes_hosts_and_keeps_the_rest() {
        let before = VolumeAccess { read_only: true, ..access(&["a", "b"]) };
        let change = VolumeAccessChange {
            allow: vec!["c".parse().unwrap(), "b:ro".parse().unwrap()],
            revoke: vec![identity("a")],
            ..VolumeAccessChange::default()
        };
        let after = before.changed(&change).unwrap();
        assert_eq!(after, VolumeAccess { read_only: true, ..access(&["b:ro", "c"]) });
        let change = VolumeAccessChange { read_only: Some(false), ..VolumeAccessChange::default() };
        assert!(!after.changed(&change).unwrap().read_only);
    }

    #[test]
    fn revoking_the_last_host_does_not_open_the_volume_by_accident() {
        let before = access(&["a"]);
        let mut change = VolumeAccessChange { revoke: vec![identity("a")], ..VolumeAccessChange::default() };
        assert_eq!(before.changed(&change), Err(AccessChangeError::WouldOpen));
        change = VolumeAccessChange { any_host: true, ..VolumeAccessChange::default() };
        let secured = VolumeAccess { tls_required: true, ..VolumeAccess::default() };
        assert_eq!(before.changed(&change), Ok(secured));
        change.tls = Some(TlsRule::Optional);
        assert_eq!(before.changed(&change), Ok(VolumeAccess::default()));
        change = VolumeAccessChange { revoke: vec![identity("b")], ..VolumeAccessChange::default() };
        assert_eq!(before.changed(&change), Err(AccessChangeError::NotListed(identity("b"))));
        change = VolumeAccessChange { tls: Some(TlsRule::Optional), ..VolumeAccessChange::default() };
        assert_eq!(before.changed(&change), Err(AccessChangeError::NeedsTls));
    }

    #[test]
    fn the_list_is_bounded_in_hosts_and_bytes() {
        let allow = |count: usize, length: usize| VolumeAccessChange {
            allow: (0..count).map(|host| format!("{host:0length$}").parse().unwrap()).collect(),
            ..VolumeAccessChange::default()
        };
        let open = VolumeAccess::default();
        assert_eq!(open.changed(&allow(64, 14)).unwrap().hosts.len(), 64);
        for (count, length) in [(65, 2), (64, 15), (8, 127)] {
            let refused = open.changed(&allow(count, length));
            assert!(matches!(refused, Err(AccessChangeError::TooMany { .. })), "{count} of {length}");
        }
    }
}
