//! What each command asks of the daemon and how the answer reads.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use anyhow::{Context, bail};
use block::VolumeName;
use control::{
    AuditVerify, CERTIFICATE_BYTES_MAX, Call, DrillStart, FailoverRequest, MirrorCreate, MirrorSet,
    MirrorStart, MirrorVerify, OrphansRequest, PartnerAdd, TenantCreate, TenantView, VolumeCreate,
    VolumeResize, VolumeView,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::arguments::{
    Arguments, AuditCommand, CertificateCommand, Command, DrillCommand, KeyCommand, MirrorCommand,
    MirrorCreateArguments, MirrorSetArguments, PartnerCommand, ProviderCommand, TenantCommand,
    TenantIdentity, VolumeCommand, VolumeCreateArguments,
};
use crate::client::Client;
use crate::output;
use crate::views;
use crate::wait::wait;

/// The daemon, and how its answers are to be printed.
struct Session {
    client: Client,
    json: bool,
}

/// Does what was asked.
///
/// # Errors
/// The daemon is not there or refuses, or an answer cannot be printed.
pub(crate) async fn run(arguments: Arguments) -> anyhow::Result<()> {
    let session = Session { client: Client::new(&arguments.socket), json: arguments.json };
    match arguments.command {
        Command::Volume(command) => session.volume(command).await,
        Command::Certificate(CertificateCommand::Show) => {
            session.ask(&Call::certificate_show(), |view| view.certificate.clone()).await
        }
        Command::Partner(command) => session.partner(command).await,
        Command::Mirror(command) => session.mirror(command).await,
        Command::Tenant(command) => session.tenant(command).await,
        Command::Key(command) => session.key(command).await,
        Command::Audit(AuditCommand::Verify { expect }) => {
            session.ask(&Call::audit_verify(&AuditVerify { expected: expect }), views::audit).await
        }
        Command::Status => session.ask(&Call::status(), views::status).await,
    }
}

impl Session {
    /// Sends the request and prints the answer.
    async fn ask<Answer: Serialize + DeserializeOwned>(
        &self,
        call: &Call<Answer>,
        text: impl FnOnce(&Answer) -> String,
    ) -> anyhow::Result<()> {
        let answer = self.client.send(call).await?;
        self.print(&answer, text)
    }

    fn print<Answer: Serialize>(
        &self,
        answer: &Answer,
        text: impl FnOnce(&Answer) -> String,
    ) -> anyhow::Result<()> {
        let text = if self.json { serde_json::to_string_pretty(answer)? + "\n" } else { text(answer) };
        output::answer(&text).context("the answer cannot be printed")
    }

    async fn remove(&self, call: &Call<()>, sentence: String) -> anyhow::Result<()> {
        self.client.send(call).await?;
        if self.json {
            return Ok(());
        }
        output::answer(&(sentence + "\n")).context("the answer cannot be printed")
    }

    async fn volume(&self, command: VolumeCommand) -> anyhow::Result<()> {
        match command {
            VolumeCommand::Create(arguments) => {
                self.make(&Call::volume_create(&volume_create(arguments))).await
            }
            VolumeCommand::Resize { name, size } => {
                self.make(&Call::volume_resize(&name, VolumeResize { size_bytes: size })).await
            }
            VolumeCommand::Access(arguments) => {
                let call = match arguments.change() {
                    Some(change) => Call::volume_access_change(&arguments.name, &change),
                    None => Call::volume_access(&arguments.name),
                };
                let view = self.client.send(&call).await?;
                if let Some(warning) = &view.warning {
                    output::complain(&format!("warning: {warning}"));
                }
                self.print(&view, |view| views::access(&view.access))
            }
            VolumeCommand::List => self.ask(&Call::volume_list(), |list| views::volumes(list)).await,
            VolumeCommand::Show { name } => self.ask(&Call::volume_show(&name), views::volume).await,
            VolumeCommand::Delete { name } => {
                self.remove(
                    &Call::volume_delete(&name),
                    format!("volume '{name}' is deleted, and its keys here are destroyed"),
                )
                .await
            }
        }
    }

    /// Sends a request that makes a volume or changes its size; a warning goes to stderr.
    async fn make(&self, call: &Call<VolumeView>) -> anyhow::Result<()> {
        let view = self.client.send(call).await?;
        if let Some(warning) = &view.warning {
            output::complain(&format!("warning: {warning}"));
        }
        self.print(&view, views::volume)
    }

    async fn tenant(&self, command: TenantCommand) -> anyhow::Result<()> {
        match command {
            TenantCommand::Create { name, id } => {
                let create = TenantCreate { name, id: id.map(|TenantIdentity(id)| id) };
                self.ask(&Call::tenant_create(&create), views::tenant).await
            }
            TenantCommand::List => self.ask(&Call::tenant_list(), |list| views::tenants(list)).await,
            TenantCommand::Show { name } => self.ask(&Call::tenant_show(&name), views::tenant).await,
            TenantCommand::Delete { name } => {
                self.remove(
                    &Call::tenant_delete(&name),
                    format!("tenant '{name}' is deleted, and its key destroyed"),
                )
                .await
            }
            TenantCommand::Lock { name } => self.set_lock(&Call::tenant_lock(&name)).await,
            TenantCommand::Unlock { name } => self.set_lock(&Call::tenant_unlock(&name)).await,
        }
    }

    async fn set_lock(&self, call: &Call<TenantView>) -> anyhow::Result<()> {
        let view = self.client.send(call).await?;
        if let Some(warning) = &view.warning {
            output::complain(&format!("warning: {warning}"));
        }
        self.print(&view, views::tenant)
    }

    async fn key(&self, command: KeyCommand) -> anyhow::Result<()> {
        match command {
            KeyCommand::Rotate { volume, tenant } => {
                let call = match (&volume, &tenant) {
                    (Some(volume), _) => Call::key_rotate_volume(volume),
                    (None, Some(tenant)) => Call::key_rotate_tenant(tenant),
                    (None, None) => bail!("name a volume, or --tenant TENANT"),
                };
                let view = self.client.send(&call).await?;
                self.print(&view, views::rotation)?;
                let failed = view.volumes.iter().filter(|volume| volume.failure.is_some()).count();
                if failed > 0 {
                    bail!(
                        "{failed} volumes keep their old keys, which still open: rotate again when that is mended"
                    );
                }
                Ok(())
            }
            KeyCommand::Provider(ProviderCommand::Test) => {
                self.ask(&Call::key_provider_test(), views::provider).await
            }
            KeyCommand::Provider(ProviderCommand::Init) => {
                self.ask(&Call::key_provider_init(), views::provider).await
            }
        }
    }

    async fn partner(&self, command: PartnerCommand) -> anyhow::Result<()> {
        match command {
            PartnerCommand::Add { name, address, certificate } => {
                let add = PartnerAdd { name, address, certificate: certificate_text(&certificate)? };
                self.ask(&Call::partner_add(&add), views::partner).await
            }
            PartnerCommand::List => self.ask(&Call::partner_list(), |list| views::partners(list)).await,
            PartnerCommand::Show { name } => self.ask(&Call::partner_show(&name), views::partner).await,
            PartnerCommand::Remove { name } => {
                self.remove(&Call::partner_remove(&name), format!("partner '{name}' is removed")).await
            }
        }
    }

    async fn mirror(&self, command: MirrorCommand) -> anyhow::Result<()> {
        match command {
            MirrorCommand::Create(arguments) => {
                self.ask(&Call::mirror_create(&mirror_create(arguments)), views::mirror).await
            }
            MirrorCommand::List => self.ask(&Call::mirror_list(), |list| views::mirrors(list)).await,
            MirrorCommand::Show { name } => self.ask(&Call::mirror_show(&name), views::mirror).await,
            MirrorCommand::Set(arguments) => {
                let name = arguments.name.clone();
                self.ask(&Call::mirror_set(&name, mirror_set(&arguments)), views::mirror).await
            }
            MirrorCommand::Verify { name, repair_from } => {
                let verify = MirrorVerify { repair_from: repair_from.map(Into::into) };
                let report = crate::verify::verify(&self.client, &name, verify).await?;
                self.print(&report, views::verify)?;
                crate::verify::judge(&name, &report)
            }
            MirrorCommand::Stop { name } => self.ask(&Call::mirror_stop(&name), views::mirror).await,
            MirrorCommand::Start { name, primary } => {
                let start = MirrorStart { primary: primary.map(Into::into) };
                self.ask(&Call::mirror_start(&name, start), views::mirror).await
            }
            MirrorCommand::Switch { name } => self.ask(&Call::mirror_switch(&name), views::mirror).await,
            MirrorCommand::Orphans { name, export } => {
                let request = OrphansRequest { export: export.map(|path| absolute(&path)).transpose()? };
                self.ask(&Call::mirror_orphans(&name, &request), views::orphans).await
            }
            MirrorCommand::Failover { name, accept_loss, at } => {
                self.failover(&name, FailoverRequest { accept_loss, at }).await
            }
            MirrorCommand::Drill(DrillCommand::Start { name, at }) => {
                self.ask(&Call::mirror_drill_start(&name, DrillStart { at }), views::mirror).await
            }
            MirrorCommand::Drill(DrillCommand::Stop { name }) => {
                self.ask(&Call::mirror_drill_stop(&name), views::mirror).await
            }
            MirrorCommand::Wait { name, goal, timeout } => {
                let view = wait(&self.client, &name, goal, timeout).await?;
                self.print(&view, views::mirror)
            }
            MirrorCommand::Delete { name } => {
                let sentence = format!("mirror '{name}' is deleted; its volumes stay");
                self.remove(&Call::mirror_delete(&name), sentence).await
            }
        }
    }

    async fn failover(&self, name: &VolumeName, failover: FailoverRequest) -> anyhow::Result<()> {
        if failover.accept_loss || failover.at.is_some() {
            let call = Call::mirror_failover(name, failover);
            return self.ask(&call, |result| views::failover(name, result)).await;
        }
        let view = self.client.send(&Call::mirror_show(name)).await?;
        match view.recovery_point {
            Some(point) => bail!(
                "mirror '{name}' was not failed over: writes after its recovery point {} of {} would be lost; \
                 give --accept-loss to accept that",
                point.position,
                point.time
            ),
            None => bail!(
                "mirror '{name}' was not failed over: it has no recovery point yet; \
                 wait for its initial copy with 'farshore mirror wait {name} --for caught-up'"
            ),
        }
    }
}

fn volume_create(arguments: VolumeCreateArguments) -> VolumeCreate {
    VolumeCreate {
        name: arguments.name,
        size_bytes: arguments.size,
        class: arguments.class,
        iops: arguments.iops,
        cache: arguments.cache.into(),
        tenant: arguments.tenant,
        access: arguments.access.change(),
    }
}

fn mirror_create(arguments: MirrorCreateArguments) -> MirrorCreate {
    MirrorCreate {
        name: arguments.name,
        partner: arguments.partner,
        volumes: arguments.volumes,
        mode: arguments.mode.into(),
        on_link_failure: arguments.on_link_failure.into(),
        rpo_seconds: arguments.rpo,
        overload: arguments.overload.into(),
        bandwidth: arguments.bandwidth,
        resync_rate: arguments.resync_rate,
    }
}

fn mirror_set(arguments: &MirrorSetArguments) -> MirrorSet {
    MirrorSet {
        mode: arguments.mode.map(Into::into),
        on_link_failure: arguments.on_link_failure.map(Into::into),
        rpo_seconds: arguments.rpo,
        overload: arguments.overload.map(Into::into),
        bandwidth: arguments.bandwidth,
        resync_rate: arguments.resync_rate,
    }
}

/// The path as the daemon can use it, whose working directory is another.
fn absolute(path: &Path) -> anyhow::Result<String> {
    let shown = path.display();
    let absolute = std::path::absolute(path).with_context(|| format!("'{shown}' is no directory"))?;
    absolute.into_os_string().into_string().map_err(|_| anyhow::anyhow!("'{shown}' is not UTF-8 text"))
}

/// The certificate file's text, if it can be one.
fn certificate_text(path: &Path) -> anyhow::Result<String> {
    let shown = path.display();
    let file = File::open(path).with_context(|| format!("certificate file '{shown}' cannot be opened"))?;
    let mut text = String::new();
    // One byte more than allowed is enough to refuse it.
    let limit = u64::try_from(CERTIFICATE_BYTES_MAX)?.saturating_add(1);
    file.take(limit)
        .read_to_string(&mut text)
        .with_context(|| format!("certificate file '{shown}' cannot be read as text"))?;
    if text.len() > CERTIFICATE_BYTES_MAX {
        bail!(
            "certificate file '{shown}' is longer than {CERTIFICATE_BYTES_MAX} bytes: give one PEM certificate"
        );
    }
    Ok(text)
}
