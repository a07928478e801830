//! How answers read to a person.

use std::time::Duration;

use block::VolumeName;
use control::{
    AuditView, FailoverResult, HostAccess, HostWrites, MirrorMode, MirrorView, OrphansView, PartnerView,
    ProviderView, RotationView, StatusView, TenantView, VerifyView, VolumeAccess, VolumeView,
};

use crate::table::Table;

/// One volume, a property a line.
pub(crate) fn volume(view: &VolumeView) -> String {
    Table::properties(vec![
        ("name", Some(view.name.to_string())),
        ("id", Some(view.id.to_string())),
        ("size", Some(view.size_bytes.to_string())),
        ("class", Some(view.class.clone())),
        ("IOPS limit", Some(view.iops_limit.to_string())),
        ("cache", Some(view.cache.to_string())),
        ("tenant", view.tenant.as_ref().map(ToString::to_string)),
        ("state", Some(view.state.to_string())),
        ("reason", view.state_reason.clone()),
        ("mirror", view.mirror.as_ref().map(ToString::to_string)),
        ("TLS", view.access.tls_required.then(|| "required".to_owned())),
        ("access", view.access.read_only.then(|| "read-only".to_owned())),
        ("hosts", Some(hosts(&view.access)).filter(|hosts| !hosts.is_empty())),
        ("URI", Some(view.uris.join(" "))),
    ])
}

/// Who may open a volume, a property a line.
pub(crate) fn access(access: &VolumeAccess) -> String {
    let tls_only = access.tls_required || !access.hosts.is_empty();
    let listed = hosts(access);
    Table::properties(vec![
        ("TLS", Some(if tls_only { "required" } else { "optional" }.to_owned())),
        ("access", Some(if access.read_only { "read-only" } else { "read-write" }.to_owned())),
        ("hosts", Some(if listed.is_empty() { "any".to_owned() } else { listed })),
    ])
}

/// The hosts as they are given to `--allow`; they may have spaces in them.
fn hosts(access: &VolumeAccess) -> String {
    let mode = |host: &HostAccess| if host.read_only { "ro" } else { "rw" };
    let hosts = access.hosts.iter().map(|host| format!("{}:{}", host.identity, mode(host)));
    hosts.collect::<Vec<_>>().join(", ")
}

/// Volumes, one a line.
pub(crate) fn volumes(views: &[VolumeView]) -> String {
    let mut table = Table::new(&["NAME", "SIZE", "CLASS", "IOPS", "STATE", "MIRROR", "URI"]);
    for view in views {
        table.row(vec![
            view.name.to_string(),
            view.size_bytes.to_string(),
            view.class.clone(),
            view.iops_limit.to_string(),
            view.state.to_string(),
            view.mirror.as_ref().map_or_else(|| "-".to_owned(), ToString::to_string),
            view.uris.first().cloned().unwrap_or_default(),
        ]);
    }
    table.text()
}

/// One tenant, a property a line.
pub(crate) fn tenant(view: &TenantView) -> String {
    Table::properties(vec![
        ("name", Some(view.name.to_string())),
        ("id", Some(view.id.to_string())),
        ("locked", Some(yes(view.locked))),
        ("key version", view.key_version.map(|version| version.to_string())),
        ("root of trust", view.root.clone()),
        ("volumes", Some(names(&view.volumes)).filter(|names| !names.is_empty())),
        ("with an older key", Some(names(&view.volumes_behind)).filter(|names| !names.is_empty())),
    ])
}

/// Tenants, one a line.
pub(crate) fn tenants(views: &[TenantView]) -> String {
    let mut table = Table::new(&["NAME", "LOCKED", "KEY VERSION", "VOLUMES"]);
    for view in views {
        table.row(vec![
            view.name.to_string(),
            yes(view.locked),
            view.key_version.map_or_else(|| "-".to_owned(), |version| version.to_string()),
            view.volumes.len().to_string(),
        ]);
    }
    table.text()
}

/// What a rotation did, a volume a line.
pub(crate) fn rotation(view: &RotationView) -> String {
    let mut table = Table::new(&["VOLUME", "KEY VERSION", "TENANT'S KEY", "ROOT", "FAILURE"]);
    for volume in &view.volumes {
        table.row(vec![
            volume.volume.to_string(),
            volume.key_version.to_string(),
            volume.domain_version.to_string(),
            volume.root.clone(),
            volume.failure.clone().unwrap_or_default(),
        ]);
    }
    table.text()
}

/// A key provider that works, a property a line.
pub(crate) fn provider(view: &ProviderView) -> String {
    let unguarded = (view.unguarded > 0)
        .then(|| format!("{} places of keys are not locked in memory: raise LimitMEMLOCK", view.unguarded));
    Table::properties(vec![
        ("provider", Some(view.provider.clone())),
        ("root key", Some(view.fingerprint.clone())),
        ("wrap and unwrap", Some(format!("{:.3} ms", view.seconds * 1000.0))),
        ("warning", unguarded),
    ])
}

/// An audit log that is whole, a property a line.
pub(crate) fn audit(view: &AuditView) -> String {
    Table::properties(vec![
        ("file", Some(view.file.clone())),
        ("lines", Some(view.lines.to_string())),
        ("last hash", Some(view.head.clone())),
    ])
}

fn names(names: &[VolumeName]) -> String {
    names.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
}

/// One partner, a property a line.
pub(crate) fn partner(view: &PartnerView) -> String {
    Table::properties(vec![
        ("name", Some(view.name.to_string())),
        ("address", Some(view.address.to_string())),
        ("fingerprint", Some(view.fingerprint.clone())),
        ("connected", Some(yes(view.connected))),
        ("last error", view.last_error.clone()),
    ])
}

/// Partners, one a line.
pub(crate) fn partners(views: &[PartnerView]) -> String {
    let mut table = Table::new(&["NAME", "ADDRESS", "CONNECTED", "LAST ERROR"]);
    for view in views {
        table.row(vec![
            view.name.to_string(),
            view.address.to_string(),
            yes(view.connected),
            view.last_error.clone().unwrap_or_default(),
        ]);
    }
    table.text()
}

/// One mirror, a property a line.
pub(crate) fn mirror(view: &MirrorView) -> String {
    let names: Vec<_> = view.volumes.iter().map(ToString::to_string).collect();
    let point = view.recovery_point.map(|point| format!("{} of {}", point.position, point.time));
    let resync = view.resync.map(|resync| {
        let end = resync.eta_seconds.map_or("unknown".to_owned(), seconds);
        format!("{} bytes to go, ends in {end}", resync.remaining_bytes)
    });
    let drill = view.drill.as_ref().map(|drill| {
        format!(
            "{} of {} as {}, scratch {} of {} bytes",
            drill.recovery_point.position,
            drill.recovery_point.time,
            drill.exports.join(" "),
            drill.scratch_bytes,
            drill.scratch_bytes_max
        )
    });
    let window = view.window.map(|window| {
        let oldest = window.oldest.map_or("nothing older than the newest".to_owned(), |oldest| {
            format!("back to {} of {}", oldest.position, oldest.time)
        });
        format!("{:.3}s of {}s: {oldest}", window.seconds, window.seconds_wanted)
    });
    Table::properties(vec![
        ("name", Some(view.name.to_string())),
        ("mode", Some(mode(view))),
        ("role", Some(view.role.to_string())),
        ("state", Some(view.state.to_string())),
        ("reason", view.state_reason.clone()),
        ("partner", Some(view.partner.to_string())),
        ("volumes", Some(names.join(" "))),
        ("synchronized", Some(yes(view.synchronized))),
        ("connected", Some(yes(view.connected))),
        ("needs start", view.needs_start.then(|| yes(true))),
        ("epoch", Some(view.epoch.to_string())),
        ("position", Some(view.position.to_string())),
        ("recovery point", Some(point.unwrap_or_else(|| "none yet".to_owned()))),
        ("window", window),
        ("drill", drill),
        ("RPO", Some(rpo(view))),
        ("RPO budget", Some(budget(view))),
        ("backlog", Some(format!("{} bytes in {}", view.backlog_bytes, view.journal_tier))),
        ("resync", resync),
        ("orphaned", (view.orphaned_bytes > 0).then(|| format!("{} bytes", view.orphaned_bytes))),
        ("overload", Some(overload(view))),
        ("bandwidth", Some(view.bandwidth.to_string())),
        ("resync rate", Some(view.resync_rate.to_string())),
        ("verify", view.verify.as_ref().map(verify_line)),
        (
            "memory",
            Some(format!(
                "ring {} of {} bytes, maps {} bytes",
                view.memory.ring_bytes, view.memory.ring_bytes_max, view.memory.map_bytes
            )),
        ),
        ("spill", Some(format!("{} of {} bytes", view.memory.spill_bytes, view.memory.spill_bytes_max))),
    ])
}

/// What a verify found, a property a line, then the extents.
pub(crate) fn verify(view: &VerifyView) -> String {
    let bytes = |count: u64| (count > 0).then(|| format!("{count} bytes"));
    let mut text = Table::properties(vec![
        ("verify", Some(view.state.to_string())),
        ("reason", view.reason.clone()),
        ("compared", Some(format!("{} of {} bytes", view.compared_bytes, view.total_bytes))),
        ("differing", Some(format!("{} bytes", view.differing_bytes))),
        ("repaired", bytes(view.repaired_bytes)),
        ("unreadable", bytes(view.unreadable_bytes)),
        ("written meanwhile", bytes(view.busy_bytes)),
    ]);
    for extent in &view.extents {
        text.push_str(&format!(
            "{} bytes at {} of volume '{}' differed\n",
            extent.length, extent.offset, extent.volume
        ));
    }
    text
}

/// Mirrors, one a line.
pub(crate) fn mirrors(views: &[MirrorView]) -> String {
    let mut table = Table::new(&["NAME", "ROLE", "STATE", "RPO", "BACKLOG", "TIER", "PARTNER"]);
    for view in views {
        table.row(vec![
            view.name.to_string(),
            view.role.to_string(),
            view.state.to_string(),
            rpo(view),
            view.backlog_bytes.to_string(),
            view.journal_tier.to_string(),
            view.partner.to_string(),
        ]);
    }
    table.text()
}

/// Orphaned writes, an extent a line.
pub(crate) fn orphans(view: &OrphansView) -> String {
    let mut table = Table::new(&["VOLUME", "OFFSET", "LENGTH", "WRITTEN", "CERTAIN"]);
    for extent in &view.extents {
        table.row(vec![
            extent.volume.to_string(),
            extent.offset_bytes.to_string(),
            extent.length_bytes.to_string(),
            extent.written.map_or_else(|| "-".to_owned(), |written| written.to_string()),
            yes(extent.exact),
        ]);
    }
    let mut text = table.text();
    text.push_str(&format!(
        "{} bytes that the new primary never had, {} more that it may have had and has overwritten since\n",
        view.exact_bytes, view.possible_bytes
    ));
    if let Some(folder) = &view.exported {
        text.push_str(&format!("exported to {folder}, decrypted\n"));
    }
    text
}

/// What a failover cost, as a sentence.
pub(crate) fn failover(name: &VolumeName, result: &FailoverResult) -> String {
    if result.zero_loss {
        return format!(
            "mirror '{name}' is primary here: recovery point {} of {}, zero loss: every answered write is here\n",
            result.recovery_point.position, result.recovery_point.time
        );
    }
    let bound = if result.seconds_lost_bound { "at most " } else { "" };
    format!(
        "mirror '{name}' is primary here: recovery point {} of {}, {bound}{:.3} seconds of writes lost\n",
        result.recovery_point.position, result.recovery_point.time, result.seconds_lost
    )
}

/// The site, a property a line, then its warnings.
pub(crate) fn status(view: &StatusView) -> String {
    let counts = view.counts;
    let mut text = Table::properties(vec![
        ("site", Some(format!("{} ({})", view.site_name, view.site))),
        ("version", Some(view.version.clone())),
        ("uptime", Some(seconds(view.uptime_seconds.floor()))),
        ("encryption", Some(view.encryption_engine.clone())),
        ("NBD", Some(view.nbd_uris.join(" "))),
        ("replication", Some(view.replication_address.clone())),
        ("console", Some(view.console_address.clone().unwrap_or_else(|| "off".to_owned()))),
        ("volumes", Some(counts.volumes.to_string())),
        ("partners", Some(counts.partners.to_string())),
        ("mirrors", Some(counts.mirrors.to_string())),
        ("connections", Some(counts.connections.to_string())),
    ]);
    for warning in &view.warnings {
        text.push_str(&format!("warning: {warning}\n"));
    }
    text
}

fn verify_line(view: &VerifyView) -> String {
    let VerifyView { state, compared_bytes, total_bytes, differing_bytes, .. } = view;
    format!("{state}, {compared_bytes} of {total_bytes} bytes compared, {differing_bytes} differ")
}

fn budget(view: &MirrorView) -> String {
    let budget = seconds(f64::from(view.rpo_budget_seconds));
    match view.pressure.rpo_alert_percent {
        0 => budget,
        alert => format!("{budget}, alert: {alert} % are used up"),
    }
}

fn mode(view: &MirrorView) -> String {
    let mut text = view.mode.to_string();
    if view.mode == MirrorMode::Sync {
        text.push_str(&format!(", {} on link failure", view.on_link_failure));
    }
    if let Some(sync) = &view.sync {
        text.push_str(&format!("; {}", sync.text));
    }
    text
}

fn overload(view: &MirrorView) -> String {
    let mut text = view.overload.to_string();
    if view.pressure.limit_lowered_percent > 0 {
        text.push_str(&format!(", limits lowered by {} %", view.pressure.limit_lowered_percent));
    }
    if view.pressure.host_writes != HostWrites::Served {
        text.push_str(&format!(", hosts' writes are {}", view.pressure.host_writes));
    }
    text
}

fn rpo(view: &MirrorView) -> String {
    let bound = if view.rpo_bound { "at most " } else { "" };
    view.rpo_seconds.map_or_else(|| "-".to_owned(), |rpo| format!("{bound}{rpo:.3}s"))
}

fn yes(truth: bool) -> String {
    if truth { "yes" } else { "no" }.to_owned()
}

/// A number of seconds as a person reads it, as in `15m`.
fn seconds(seconds: f64) -> String {
    Duration::try_from_secs_f64(seconds)
        .map_or_else(|_| format!("{seconds} s"), |duration| humantime::format_duration(duration).to_string())
}
