//! Settings by file and flags.

use super::*;

fn dev(flags: &str) -> Result<Settings, SettingsError> {
    Settings::from_args(["farshored", "--dev", "/srv/az1"].into_iter().chain(flags.split_whitespace()))
}

fn config(text: &str, flags: &str) -> Result<Settings, SettingsError> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("farshored.toml");
    std::fs::write(&path, text).unwrap();
    let arguments = ["farshored", "--config", path.to_str().unwrap()];
    Settings::from_args(arguments.into_iter().chain(flags.split_whitespace()))
}

#[test]
fn dev_keeps_everything_under_its_directory() {
    let settings = dev("").unwrap();
    assert_eq!(settings.site.as_str(), "az1");
    assert_eq!(settings.data_dir, Path::new("/srv/az1"));
    assert_eq!(settings.pools.values().next().unwrap(), Path::new("/srv/az1/pool"));
    assert_eq!(settings.control_socket, Path::new("/srv/az1/control.sock"));
    assert_eq!(settings.kek_file, Path::new("/srv/az1/kek"));
    assert_eq!(settings.nbd_listen, ["127.0.0.1:10809".parse().unwrap()]);
    assert_eq!(settings.replication_listen, "127.0.0.1:10820".parse().unwrap());
    assert_eq!(settings.console_listen, ConsoleAddress::Tcp("127.0.0.1:10880".parse().unwrap()));
    assert_eq!((settings.minimum_size, settings.action), (ByteCount(MIB), Action::Serve));
}

#[test]
fn flags_override_the_file_which_overrides_the_defaults() {
    let text = "site = 'a'\nshards = 3\ncut_bytes = 131072\n[classes]\nstandard = 100\ngold = 'unlimited'\n";
    let settings = config(text, "--site b --nbd unix:/tmp/n --nbd 127.0.0.1:1 --console off").unwrap();
    assert_eq!((settings.site.as_str(), settings.shards.get()), ("b", 3));
    assert_eq!(settings.cut, ByteCount(131_072));
    assert_eq!(settings.minimum_size, ByteCount(500 << 30));
    assert_eq!(settings.nbd_listen.len(), 2);
    assert_eq!(settings.console_listen, ConsoleAddress::Off);
    assert_eq!(settings.class("standard").unwrap().iops_per_tib, NonZeroU32::new(100));
    assert_eq!(settings.class("gold").unwrap().iops_per_tib, None);
    assert!(settings.may_mirror(settings.class("premium").unwrap()));
    assert!(!settings.may_mirror(settings.class("standard").unwrap()));
}

#[test]
fn the_effective_settings_read_again_are_the_same() {
    let tls = "site = 'a'\nnbd_certificate_file = '/c'\nnbd_key_file = '/k'\nnbd_client_ca_file = '/a'\n\
               nbd_listen = ['unix:/n', { address = '0.0.0.0:1', tls = 'required' }]\n";
    let flags = "--nbd unix:/tmp/n --nbd 127.0.0.1:1,tls=optional --nbd-client-ca /a --shards 2";
    for settings in [dev(flags), config("site = 'a'", ""), config(tls, "")] {
        let settings = settings.unwrap();
        assert_eq!(config(&settings.effective(), "").unwrap(), settings);
    }
}

#[test]
fn every_refusal_names_the_key_the_value_and_what_to_do() {
    for (text, expected) in [
        ("", "setting 'site' is missing"),
        ("site = 'a'\nringbytes = 1", "line 2: unknown field `ringbytes`"),
        ("site = 'a'\n[pools]\nx = ", "line 3"),
        ("site = '../a'", "name '../a' is not allowed"),
        ("site = 'a'\nring_bytes = 5", "setting 'ring_bytes' = 5 is not allowed: give 4194304 to"),
        ("site = 'a'\nshards = 1000", "setting 'shards' = 1000 is not allowed: give 1 to 256"),
        ("site = 'a'\nintent_region_bytes = 1048577", "give a power of two"),
        ("site = 'a'\nredo_segment_bytes = 33554433", "give a multiple of 4096"),
        ("site = 'a'\n[pools]", "setting 'pools' = {} is not allowed: name at least one pool"),
        ("site = 'a'\n[pools]\na = '/p'\nb = '/p'", "give each pool its own folder"),
        ("site = 'a'\nnbd_listen = []", "setting 'nbd_listen' = 0 is not allowed"),
        ("site = 'a'\nnbd_listen = ['unix:/a,b,tls=required']", "path has no comma"),
        ("site = 'a'\nnbd_listen = ['unix:/a, tls=required']", "TLS mode ' tls=required' is not understood"),
        ("site = 'a'\nnbd_listen = [{ address = 'unix:/a,b' }]", "path has no comma"),
        ("site = 'a'\nnbd_listen = ['localhost']", "write IP:PORT or unix:PATH"),
        ("site = 'a'\nnbd_listen = ['0.0.0.0:10809']", "set nbd_allow_plain = true"),
        (
            "site = 'a'\nnbd_listen = [{ address = '[::]:1', tls = 'optional' }]",
            "'nbd_listen' = [::]:1 is not allowed: NBD without TLS would cross the network",
        ),
        ("site = 'a'\nnbd_listen = [{ address = '[::]:1', tls = 'yes' }]", "unknown variant `yes`"),
        ("site = 'a'\nnbd_key_file = 'k'", "setting 'nbd_certificate_file' is missing"),
        ("site = 'a'\nnbd_certificate_file = 'c'", "setting 'nbd_key_file' is missing"),
        ("site = 'a'\nnbd_connections_max = 16385", "give 1 to 16384"),
        ("site = 'a'\n[classes]\nx = 0", "IOPS limit '0' is not understood"),
    ] {
        let refused = config(text, "").unwrap_err().to_string();
        assert!(refused.contains(expected), "{text}: {refused}");
        assert_eq!(refused.lines().count(), 1, "{refused}");
    }
    let long = format!("site = 'a'\ncontrol_socket = '/{}'", "x".repeat(120));
    assert!(config(&long, "").unwrap_err().to_string().contains("at most 107 bytes"));
    config("site = 'a'\nnbd_allow_plain = true\nnbd_listen = ['[::]:10809']", "").unwrap();
    config("site = 'a'\nnbd_listen = [{ address = '[::]:10809', tls = 'required' }]", "").unwrap();
}

#[test]
fn one_base_is_needed_and_a_missing_file_is_named() {
    for arguments in ["farshored", "farshored --dev a --config b", "farshored --dev a --nbd nowhere"] {
        assert!(matches!(Settings::from_args(arguments.split(' ')), Err(SettingsError::Usage(_))));
    }
    let refused = Settings::from_args(["farshored", "--config", "/nonexistent.toml"]).unwrap_err();
    assert!(refused.to_string().contains("'/nonexistent.toml' cannot be read"));
    let action = |flag| dev(flag).unwrap().action;
    assert_eq!(action("--rebuild-catalogue"), Action::RebuildCatalogue);
    assert_eq!(action("--print-settings"), Action::PrintSettings);
}

#[test]
fn a_path_that_toml_cannot_say_is_refused() {
    use std::os::unix::ffi::OsStringExt;
    let directory = OsString::from_vec(b"/srv/\xff".to_vec());
    let refused = Settings::from_args(["farshored".into(), "--dev".into(), directory]).unwrap_err();
    assert!(refused.to_string().contains("must be UTF-8"), "{refused}");
}
