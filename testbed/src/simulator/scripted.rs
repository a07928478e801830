//! What scripted tests of the simulator have in common.

use super::plan::SECOND;
use super::world::World;

/// Lets events happen until `done`, which is asked before each and may give orders.
pub(super) fn run_until(world: &mut World, what: &str, mut done: impl FnMut(&mut World) -> bool) {
    while !done(world) {
        let Some(((at, _), event)) = world.events.pop_first() else {
            panic!("nothing happens any more: {what}")
        };
        world.now = at;
        assert!(at < 300 * SECOND, "not in time: {what}: {}", world.describe());
        world.handle(event);
        assert_eq!(world.failure, None, "{what}");
    }
}
