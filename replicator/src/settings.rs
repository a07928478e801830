//! What an operator may tune in the transport, and the quinn configuration that follows from it.

use std::sync::Arc;
use std::time::Duration;

use quinn::congestion::{BbrConfig, CubicConfig, NewRenoConfig};
use quinn::{IdleTimeout, MtuDiscoveryConfig, TransportConfig, VarInt};

/// quinn hands up to ten packets to the kernel in one call, and the kernel takes 65,507 bytes: with larger packets
/// every full batch would be dropped (EMSGSIZE, which quinn takes for a lost MTU probe).
const UDP_PAYLOAD_BYTES_MAX: u16 = 65_507 / 10;

/// Streams that carry the cuts of a session in turn; part of the protocol (docs/protocols/transport.md).
pub(crate) const DATA_STREAMS: u8 = 16;
/// What one stream may have in flight. quinn-proto ends the connection ("too many gaps in stream buffer") when a
/// stream's received data lies in more than 1024 pieces; with packets of 1200 bytes this window holds 1710, thus
/// at most 855 pieces, whatever the loss. One stream with a window for a long fat link dies on a lossy one.
const STREAM_WINDOW_BYTES_MAX: u32 = 1920 << 10;
/// The part of a session's receive window that cuts cannot take.
const CONTROL_WINDOW_BYTES: u32 = 2 << 20;

/// Bytes in flight before the first acknowledgement: ten of the largest packets, as RFC 9002 section 7.2 counts
/// them. quinn counts 1200-byte packets, so that its own first MTU probe would fill the window.
const INITIAL_WINDOW_BYTES: u64 = 64 << 10;

/// How the sender finds its rate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Congestion {
    /// BBR version 1, which quinn calls experimental: keeps its rate through random loss, may crowd out others.
    /// The default, since a mirror's recovery point depends on the rate, and one lost packet in a thousand leaves
    /// Cubic a hundredth of it at 20 ms (docs/protocols/transport.md).
    #[default]
    Bbr,
    /// RFC 9438: fair to other traffic on a shared link, slow where packets are lost at random.
    Cubic,
    /// RFC 9002 appendix B: the plainest, for comparison.
    NewReno,
}

/// The transport's settings. The defaults carry 200 MB/s at a round trip of 20 ms with room for four times that.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TransportSettings {
    /// Bytes that the peer may send in a session ahead of our reading; over it the peer stops. 200 MB/s at 20 ms is
    /// 4 MB in flight, and what follows a lost packet waits here for a round trip or two. 32 MiB: 2 MiB for control
    /// frames, the rest in equal parts for the data streams, each at most 1.875 MiB.
    pub receive_window_bytes: u32,
    /// Bytes that QUIC keeps for a session until the peer has acknowledged them. 32 MiB, as the
    /// partner's receive window: with less, control frames wait behind cuts.
    pub send_window_bytes: u32,
    /// Bytes of cuts that may wait for QUIC in a session before sends are refused as full. 16 MiB.
    pub queued_cut_bytes_max: u32,
    /// The longest cut that is sent or accepted: a cut closes at about 1 MiB, one with a single large step at
    /// about 2 MiB. 8 MiB.
    pub cut_bytes_max: u32,
    /// The longest control frame that is sent or accepted. 1 MiB.
    pub control_frame_bytes_max: u32,
    /// How the sender finds its rate.
    pub congestion: Congestion,
    /// The round trip assumed before the first measurement; sets the first retransmission (three of these).
    /// 100 ms: above any distance between zones, below QUIC's 333 ms, which costs a second at each lost first packet.
    pub initial_rtt: Duration,
    /// A dial ends after this, whatever happens. 5 s: a few lost first packets, then the caller's own backoff.
    pub connect_timeout: Duration,
    /// A session without any packet for this long is closed as lost. 10 s: five keep-alives.
    pub idle_timeout: Duration,
    /// How often a silent session is probed. 2 s: a cut link is then noticed in 8 to 10 s.
    pub keep_alive_interval: Duration,
    /// The largest UDP payload that path MTU discovery tries: 1200 to 6550. 6550, which needs jumbo frames on the
    /// path; discovery finds what the path carries.
    pub udp_payload_bytes_max: u16,
    /// Socket buffers asked of the kernel; it gives at most net.core.rmem_max and wmem_max. 8 MiB: 40 ms at 200 MB/s.
    pub udp_buffer_bytes: u32,
}

impl Default for TransportSettings {
    fn default() -> Self {
        Self {
            receive_window_bytes: 32 << 20,
            send_window_bytes: 32 << 20,
            queued_cut_bytes_max: 16 << 20,
            cut_bytes_max: 8 << 20,
            control_frame_bytes_max: 1 << 20,
            congestion: Congestion::default(),
            initial_rtt: Duration::from_millis(100),
            connect_timeout: Duration::from_secs(5),
            idle_timeout: Duration::from_secs(10),
            keep_alive_interval: Duration::from_secs(2),
            udp_payload_bytes_max: UDP_PAYLOAD_BYTES_MAX,
            udp_buffer_bytes: 8 << 20,
        }
    }
}

/// A setting that cannot work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("replication setting '{setting}' is out of range: {rule}")]
pub struct SettingsError {
    /// The field.
    pub setting: &'static str,
    /// What it must be.
    pub rule: &'static str,
}

impl TransportSettings {
    /// Checks that the values fit together.
    ///
    /// # Errors
    /// The first setting that does not, with its rule.
    pub fn check(&self) -> Result<(), SettingsError> {
        let rules = [
            (self.control_frame_bytes_max >= 1, "control_frame_bytes_max", "it must be at least 1"),
            (self.cut_bytes_max >= 256, "cut_bytes_max", "it must be at least a cut header, 256"),
            (self.receive_window_bytes >= 4 << 20, "receive_window_bytes", "it must be at least 4 MiB"),
            (self.send_window_bytes >= 1 << 20, "send_window_bytes", "it must be at least 1 MiB"),
            (self.queued_cut_bytes_max >= 1, "queued_cut_bytes_max", "it must be at least 1"),
            (
                self.idle_timeout >= Duration::from_millis(100)
                    && self.idle_timeout <= Duration::from_secs(600),
                "idle_timeout",
                "it must be 100 ms to 10 minutes",
            ),
            (
                !self.keep_alive_interval.is_zero() && self.keep_alive_interval < self.idle_timeout,
                "keep_alive_interval",
                "it must be above 0 and below idle_timeout, or every quiet session ends",
            ),
            (!self.connect_timeout.is_zero(), "connect_timeout", "it must be above 0"),
            (!self.initial_rtt.is_zero(), "initial_rtt", "it must be above 0"),
            (
                (1200..=UDP_PAYLOAD_BYTES_MAX).contains(&self.udp_payload_bytes_max),
                "udp_payload_bytes_max",
                "it must be 1200 to 6550",
            ),
        ];
        match rules.into_iter().find(|(holds, ..)| !holds) {
            Some((_, setting, rule)) => Err(SettingsError { setting, rule }),
            None => Ok(()),
        }
    }

    /// The receive window of each data stream: all together leave room for control frames.
    fn stream_window_bytes(&self) -> u32 {
        let share = self.receive_window_bytes.saturating_sub(CONTROL_WINDOW_BYTES) / u32::from(DATA_STREAMS);
        share.min(STREAM_WINDOW_BYTES_MAX)
    }

    /// The quinn configuration of the side that dials, which takes no streams of the peer, or accepts them.
    pub(crate) fn transport(&self, accepts: bool) -> Arc<TransportConfig> {
        let (control, data) = if accepts { (1_u8, DATA_STREAMS) } else { (0, 0) };
        let mut config = TransportConfig::default();
        let mut discovery = MtuDiscoveryConfig::default();
        discovery.upper_bound(self.udp_payload_bytes_max);
        let idle = u32::try_from(self.idle_timeout.as_millis()).unwrap_or(u32::MAX);
        config
            .max_concurrent_bidi_streams(control.into())
            .max_concurrent_uni_streams(data.into())
            .datagram_receive_buffer_size(None)
            .stream_receive_window(self.stream_window_bytes().into())
            .receive_window(self.receive_window_bytes.into())
            // Cuts leave in the order in which they were written, so the next one is complete first.
            .send_fairness(false)
            .send_window(self.send_window_bytes.into())
            .initial_rtt(self.initial_rtt)
            .max_idle_timeout(Some(IdleTimeout::from(VarInt::from_u32(idle))))
            .keep_alive_interval(Some(self.keep_alive_interval))
            .mtu_discovery_config(Some(discovery));
        match self.congestion {
            Congestion::Cubic => {
                let mut cubic = CubicConfig::default();
                cubic.initial_window(INITIAL_WINDOW_BYTES);
                config.congestion_controller_factory(Arc::new(cubic));
            }
            Congestion::Bbr => {
                let mut bbr = BbrConfig::default();
                bbr.initial_window(INITIAL_WINDOW_BYTES);
                config.congestion_controller_factory(Arc::new(bbr));
            }
            Congestion::NewReno => {
                let mut reno = NewRenoConfig::default();
                reno.initial_window(INITIAL_WINDOW_BYTES);
                config.congestion_controller_factory(Arc::new(reno));
            }
        }
        Arc::new(config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_in_range_and_a_setting_that_cannot_work_is_named() {
        TransportSettings::default().check().unwrap();
        let bad = TransportSettings { keep_alive_interval: Duration::from_secs(11), ..Default::default() };
        assert_eq!(bad.check().unwrap_err().setting, "keep_alive_interval");
        let bad = TransportSettings { receive_window_bytes: 1 << 20, ..Default::default() };
        assert_eq!(bad.check().unwrap_err().setting, "receive_window_bytes");
    }
    #[test]
    fn data_streams_never_take_the_whole_receive_window() {
        for receive_window_bytes in [4 << 20, 5_000_000, 32 << 20, u32::MAX] {
            let settings = TransportSettings { receive_window_bytes, ..Default::default() };
            settings.check().unwrap();
            let data = u64::from(settings.stream_window_bytes()) * u64::from(DATA_STREAMS);
            assert!(data + u64::from(CONTROL_WINDOW_BYTES) <= u64::from(receive_window_bytes));
        }
    }
}
