//! No plaintext in any file of either site.

use std::time::Duration;

use anyhow::{Result, ensure};
use testbed::harness::{NbdClient, Pair, World, directory_contains};

/// Sixteen bytes, as an XTS block: repeated at every alignment that the cipher could leave alone.
const MARKER: &[u8; 16] = b"plaintext-marker";

#[test]
fn a_marker_written_through_nbd_is_in_no_file_of_either_site() -> Result<()> {
    World::run(|world| {
        // The search itself must find it where it is.
        std::fs::create_dir(world.path("control"))?;
        std::fs::write(world.path("control").join("file"), MARKER.repeat(3))?;
        let found = directory_contains(&world.path("control"), MARKER)?;
        ensure!(found.len() == 1, "the search does not find the marker");

        let mut pair = Pair::with_mirrored_volume(world, 32)?;
        let data = MARKER.repeat(4096);
        let length = u64::try_from(data.len())?;
        let mut client = NbdClient::connect(&pair.west.export("data"))?;
        for number in 0..200 {
            client.write(number * length, &data)?;
            client.write(20_000_000 + number * 5000 + 3, &MARKER[..])?;
        }
        client.flush()?;
        search(&pair)?;
        // Also what the dirty map and a resync write while the link is down and after.
        pair.cut();
        client.write(0, &data)?;
        client.write_zeroes(length, 100)?;
        std::thread::sleep(Duration::from_secs(1));
        search(&pair)?;
        pair.heal();
        pair.wait_caught_up()?;
        let mut back = vec![0; data.len()];
        client.read(0, &mut back)?;
        ensure!(back == data, "the host reads the marker back");
        client.disconnect()?;
        pair.check_equal("data")?;
        pair.west.terminate()?;
        pair.east.terminate()?;
        search(&pair)
    })
}

fn search(pair: &Pair) -> Result<()> {
    for site in [&pair.west, &pair.east] {
        let found = directory_contains(site.directory(), MARKER)?;
        ensure!(found.is_empty(), "plaintext at {} in {found:?}", site.name());
    }
    Ok(())
}
