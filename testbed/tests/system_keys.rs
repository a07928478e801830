//! Tenants, locks, rotations and key providers with real daemons: what is locked is offline at both sites, what is rotated
//! opens everywhere, and no key or replaced wrap stays in any file.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use testbed::harness::{NbdClient, Pair, Site, SiteOptions, World, directory_contains};

const PATIENCE: Duration = Duration::from_secs(30);

/// Waits until the volume is in this state.
fn wait_for_state(site: &Site, volume: &str, state: &str) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let view = site.json(&format!("volume show {volume}"))?;
        if view.get("state").is_some_and(|found| found == state) {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "{volume} is not {state}: {view:#}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn write_and_read(site: &Site, volume: &str, byte: u8) -> Result<()> {
    let mut client = NbdClient::connect(&site.export(volume))?;
    client.write(0, &[byte; 4096])?;
    client.flush()?;
    check_content(&mut client, byte)?;
    client.disconnect()?;
    Ok(())
}

fn check_content(client: &mut NbdClient, byte: u8) -> Result<()> {
    let mut back = [0; 4096];
    client.read(0, &mut back)?;
    ensure!(back == [byte; 4096], "another content than was written");
    Ok(())
}

fn reads(site: &Site, volume: &str, byte: u8) -> Result<()> {
    let mut client = NbdClient::connect(&site.export(volume))?;
    check_content(&mut client, byte)?;
    client.disconnect()?;
    Ok(())
}

/// The wraps in a volume's header, as they stand in its newer slot.
fn wraps(site: &Site, volume: &str) -> Result<Vec<u8>> {
    let header = site.data_file(volume)?.with_file_name("header");
    let bytes = fs::read(&header)?;
    let slots = bytes.chunks(16 << 10).filter(|slot| slot.starts_with(b"FARSHVOL"));
    let generation =
        |slot: &&[u8]| slot.get(16..24).map(|bytes| bytes.iter().rev().copied().collect::<Vec<_>>());
    let newest = slots.max_by_key(generation).context("no slot")?;
    let place = newest.windows(4).position(|part| part == b"FKEY").context("no record in the header")?;
    Ok(newest.get(place + 32..place + 192).context("a short record")?.to_vec())
}

/// The files of the site that hold the bytes, plain or as hexadecimal digits.
fn holders(site: &Site, bytes: &[u8]) -> Result<Vec<String>> {
    let digits: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    let mut found = directory_contains(site.directory(), bytes)?;
    found.extend(directory_contains(site.directory(), digits.as_bytes())?);
    Ok(found)
}

#[test]
fn a_locked_tenant_is_offline_at_once_over_restarts_and_back_when_unlocked() -> Result<()> {
    World::run(|world| {
        let mut site = world.site("site", SiteOptions::default())?;
        site.log().allow("locked");
        site.run("tenant create acme")?;
        site.run("volume create theirs --size 8MiB --tenant acme")?;
        site.run("volume create ours --size 8MiB")?;
        ensure!(site.json("volume show theirs")?["tenant"] == "acme");
        ensure!(site.json("volume show ours")?["tenant"] == "default");
        write_and_read(&site, "theirs", 1)?;
        write_and_read(&site, "ours", 2)?;

        let mut inside = NbdClient::connect(&site.export("theirs"))?;
        check_content(&mut inside, 1)?;
        site.run("tenant lock acme")?;
        // When the lock is answered, nobody reads any more.
        ensure!(inside.read(0, &mut [0; 4096]).is_err(), "a host reads a locked volume");
        ensure!(NbdClient::connect(&site.export("theirs")).is_err(), "a locked volume is served");
        ensure!(site.json("volume show theirs")?["state"] == "locked");
        reads(&site, "ours", 2)?;
        // The expanded keys are locked in memory; no core file is written and no stranger reads the memory.
        let process = PathBuf::from(format!("/proc/{}", site.process_id()?));
        let status = fs::read_to_string(process.join("status"))?;
        let locked = status.lines().find_map(|line| line.strip_prefix("VmLck:")).context("no VmLck")?;
        ensure!(locked.trim() != "0 kB", "no key is locked in memory");
        let limits = fs::read_to_string(process.join("limits"))?;
        let core = limits.lines().find_map(|line| line.strip_prefix("Max core file size"));
        ensure!(core.context("no core limit")?.split_whitespace().take(2).eq(["0", "0"]), "{limits}");
        let refused = site.refused("volume create more --size 8MiB --tenant acme")?;
        ensure!(refused.contains("is locked"), "{refused}");

        site.restart()?;
        ensure!(site.json("volume show theirs")?["state"] == "locked", "the lock holds over a restart");
        reads(&site, "ours", 2)?;
        site.run("tenant unlock acme")?;
        wait_for_state(&site, "theirs", "online")?;
        reads(&site, "theirs", 1)?;
        // Also without a restart between.
        site.run("tenant lock acme")?;
        site.run("tenant unlock acme")?;
        wait_for_state(&site, "theirs", "online")?;
        reads(&site, "theirs", 1)?;

        let refused = site.refused("tenant delete acme")?;
        ensure!(refused.contains("delete the volumes first"), "{refused}");
        let key = wraps(&site, "theirs")?;
        ensure!(!holders(&site, &key)?.is_empty(), "the search does not find the wrap");
        site.run("volume delete theirs")?;
        ensure!(holders(&site, &key)?.is_empty(), "a destroyed key is in {:?}", holders(&site, &key)?);
        site.run("tenant delete acme")?;
        audit(&site, &["tenant lock", "tenant unlock", "key destroy", "tenant delete"])?;
        site.terminate()
    })
}

/// The audit log is whole, and has these actions.
fn audit(site: &Site, actions: &[&str]) -> Result<()> {
    let view = site.json("audit verify")?;
    let head = view.get("head").and_then(serde_json::Value::as_str).context("no head")?;
    site.run(&format!("audit verify --expect {head}"))?;
    let text = fs::read_to_string(site.directory().join("audit.log"))?;
    for action in actions {
        ensure!(text.contains(&format!("\"action\":\"{action}\"")), "no {action} in\n{text}");
    }
    ensure!(text.contains("\"actor\":\"user "), "no actor in\n{text}");
    let tampered = text.replacen("tenant", "tenent", 1);
    if tampered != text {
        fs::write(site.directory().join("audit.log"), tampered)?;
        let refused = site.refused("audit verify")?;
        ensure!(refused.contains("line 1 was changed"), "{refused}");
        fs::write(site.directory().join("audit.log"), text)?;
    }
    Ok(())
}

#[test]
fn a_rotation_changes_the_wraps_at_both_sites_and_a_partner_away_keeps_the_old() -> Result<()> {
    World::run(|world| {
        let mut pair = Pair::start(world)?;
        pair.west.run("tenant create acme")?;
        pair.west.run("volume create data --size 16MiB --iops unlimited --tenant acme")?;
        pair.mirror(&["data"])?;
        write_and_read(&pair.west, "data", 7)?;
        let first = wraps(&pair.west, "data")?;
        ensure!(wraps(&pair.east, "data")? == first, "the replica has the primary's wraps");

        pair.west.run("key rotate data")?;
        let second = wraps(&pair.west, "data")?;
        ensure!(second != first && wraps(&pair.east, "data")? == second, "both sites have the new wraps");
        for site in [&pair.west, &pair.east] {
            let found = holders(site, &first)?;
            ensure!(found.is_empty(), "a replaced wrap at {} in {found:?}", site.name());
        }
        // Without the partner the old wraps stay in force everywhere.
        pair.cut();
        let refused = pair.west.refused("key rotate data")?;
        ensure!(refused.contains("stays as it is"), "{refused}");
        ensure!(wraps(&pair.west, "data")? == second);
        pair.heal();
        pair.wait_caught_up()?;
        let view = pair.west.json("key rotate --tenant acme")?;
        ensure!(
            view["volumes"][0]["domain_version"] == 2 && view["volumes"][0]["failure"].is_null(),
            "{view:#}"
        );
        ensure!(wraps(&pair.east, "data")? == wraps(&pair.west, "data")?);
        ensure!(pair.west.json("tenant show acme")?["volumes_behind"] == serde_json::json!([]));

        // The replica's rotated key opens at a promotion, and over a restart of both.
        pair.west.kill9()?;
        pair.east.run("mirror failover mirror --accept-loss")?;
        reads(&pair.east, "data", 7)?;
        pair.east.terminate()?;
        pair.east.resume()?;
        Ok(())
    })
}

#[test]
fn a_tenants_lock_reaches_the_partner_and_forbids_a_promotion() -> Result<()> {
    World::run(|world| {
        let mut pair = Pair::start(world)?;
        for site in [&pair.west, &pair.east] {
            site.log().allow("locked");
        }
        pair.west.run("tenant create acme")?;
        pair.west.run("volume create data --size 16MiB --iops unlimited --tenant acme")?;
        pair.mirror(&["data"])?;
        write_and_read(&pair.west, "data", 7)?;
        pair.wait_caught_up()?;
        pair.west.run("tenant lock acme")?;
        ensure!(NbdClient::connect(&pair.west.export("data")).is_err(), "a locked primary is served");
        let tenant = pair.east.json("volume show data")?["tenant"].as_str().context("no tenant")?.to_owned();
        ensure!(
            pair.east.json(&format!("tenant show {tenant}"))?["locked"] == true,
            "the lock is at the partner"
        );
        pair.west.kill9()?;
        let refused = pair.east.refused("mirror failover mirror --accept-loss")?;
        ensure!(refused.contains("is locked"), "{refused}");
        pair.east.run(&format!("tenant unlock {tenant}"))?;
        pair.east.run("mirror failover mirror --accept-loss")?;
        reads(&pair.east, "data", 7)
    })
}

#[test]
fn volumes_wait_for_a_key_file_that_comes_back_and_running_ones_go_on() -> Result<()> {
    World::run(|world| {
        let mut site = world.site("site", SiteOptions::default())?;
        site.log().allow("locked");
        site.run("volume create data --size 8MiB")?;
        write_and_read(&site, "data", 3)?;
        let key = site.directory().join("kek");
        let root = fs::read(&key)?;
        let root = root.strip_suffix(b"\n").unwrap_or(&root).to_vec();
        let away = world.path("kek-away");
        fs::rename(&key, &away)?;
        // What runs goes on; what needs the root key is refused in a sentence.
        reads(&site, "data", 3)?;
        let refused = site.refused("key provider test")?;
        ensure!(refused.contains("cannot be read"), "{refused}");
        let refused = site.refused("volume create more --size 8MiB")?;
        ensure!(refused.contains("no key for it"), "{refused}");
        site.restart()?;
        let view = site.json("volume show data")?;
        ensure!(view["state"] == "locked", "{view:#}");
        ensure!(!key.exists(), "no other root key is made in place of the missing one");
        ensure!(
            directory_contains(site.directory(), &root)?.is_empty(),
            "the root key is in a file of the site"
        );
        fs::rename(&away, &key)?;
        wait_for_state(&site, "data", "online")?;
        reads(&site, "data", 3)?;
        site.run("key provider test")?;
        site.terminate()
    })
}

/// A SoftHSM token with a PIN file; the setting that names a key in it.
fn token(folder: &Path) -> Result<String> {
    let places = ["/usr/lib/softhsm/libsofthsm2.so", "/usr/lib/x86_64-linux-gnu/softhsm/libsofthsm2.so"];
    let module = places.into_iter().find(|path| Path::new(path).exists());
    let module = module.context("SoftHSM is not there: install the package softhsm2")?;
    fs::create_dir_all(folder.join("tokens"))?;
    let configuration = folder.join("softhsm2.conf");
    fs::write(&configuration, format!("directories.tokendir = {}\n", folder.join("tokens").display()))?;
    let pin = folder.join("pin");
    fs::write(&pin, "4321\n")?;
    fs::set_permissions(&pin, fs::Permissions::from_mode(0o600))?;
    let output = Command::new("softhsm2-util")
        .env("SOFTHSM2_CONF", &configuration)
        .args(["--init-token", "--free", "--label", "farshore", "--pin", "4321", "--so-pin", "8765"])
        .output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(format!(
        "\"pkcs11:token=farshore;object=root?module-path={module}&pin-source=file:{}\"",
        pin.display()
    ))
}

#[test]
fn a_token_wraps_the_keys_of_a_site_and_what_a_file_wrapped_is_taken_over() -> Result<()> {
    World::run(|world| {
        let folder = world.path("hsm");
        let uri = token(&folder)?;
        // A volume from before, under the key file.
        let mut site = world.site("site", SiteOptions::default())?;
        site.log().allow("locked");
        site.run("volume create data --size 8MiB")?;
        write_and_read(&site, "data", 3)?;
        site.terminate()?;
        site.set_environment("SOFTHSM2_CONF", &folder.join("softhsm2.conf"));
        site.set_setting("key_provider", &uri)?;
        site.resume()?;
        let refused = site.refused("key provider test")?;
        ensure!(refused.contains("has no AES key 'root'"), "{refused}");
        site.run("key provider init")?;
        site.run("key provider test")?;
        reads(&site, "data", 3)?;
        let view = site.json("key rotate --tenant default")?;
        ensure!(view["volumes"][0]["root"] == "pkcs11", "{view:#}");
        fs::remove_file(site.directory().join("kek"))?;
        site.restart()?;
        reads(&site, "data", 3)?;
        site.run("volume create more --size 8MiB")?;

        // A token that cannot be opened locks, and is tried again.
        let pin = folder.join("pin");
        fs::rename(&pin, folder.join("pin-away"))?;
        site.restart()?;
        ensure!(site.json("volume show data")?["state"] == "locked");
        fs::rename(folder.join("pin-away"), &pin)?;
        wait_for_state(&site, "data", "online")?;
        reads(&site, "data", 3)?;
        site.terminate()
    })
}

#[test]
fn a_volume_from_before_tenants_opens_and_a_rotation_gives_it_a_record() -> Result<()> {
    World::run(|world| {
        let mut site = world.site("site", SiteOptions::default())?;
        site.run("volume create data --size 8MiB")?;
        site.terminate()?;
        let digits = fs::read_to_string(site.directory().join("kek"))?;
        let root = crypto::KeyEncryptionKey::from_bytes(root_bytes(digits.trim())?);
        let key = crypto::DataKey::from_random(std::array::from_fn(|at| u8::from(at == 0)))?;
        {
            let lock = daemon::catalogue::DirectoryLock::acquire(site.directory())?;
            let pools = [("default".parse()?, site.directory().join("pool"))].into();
            let (catalogue, _) = daemon::catalogue::Catalogue::open(lock, pools)?;
            let volume = catalogue.volume(&"data".parse()?).context("no volume")?;
            catalogue.replace_key(volume.id, root.wrap(&key).as_bytes().to_vec())?;
        }
        site.resume()?;
        write_and_read(&site, "data", 9)?;
        let view = site.json("volume show data")?;
        ensure!(view["tenant"] == "default", "{view:#}");
        let view = site.json("key rotate data")?;
        ensure!(view["volumes"][0]["key_version"] == 1, "{view:#}");
        wraps(&site, "data")?;
        reads(&site, "data", 9)?;
        site.restart()?;
        reads(&site, "data", 9)?;
        site.terminate()
    })
}

fn root_bytes(digits: &str) -> Result<[u8; 32]> {
    let mut bytes = [0; 32];
    for (at, byte) in bytes.iter_mut().enumerate() {
        let pair = digits.get(2 * at..2 * at + 2).context("a short key file")?;
        *byte = u8::from_str_radix(pair, 16)?;
    }
    Ok(bytes)
}
