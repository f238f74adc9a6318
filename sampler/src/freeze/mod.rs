//! Freezing a cgroup for a bounded time, so that it is thawed whatever ends meanwhile.
//!
//! ```text
//!  command --pipe--> guard (a process of its own session) --writes--> cgroup.freeze or freezer.state
//!     |                |  thaws: on request, at its deadline, when the pipe closes
//!     |                '--before it freezes--> RUNTIME_DIR/frozen.json --read every 0.5 s--> agent
//!     '--kills and thaws when the guard ends without a reply thaws when the guard is dead or late --'
//! ```
//! - **One of the three lives**: the guard thaws if the command is killed, the command thaws within a second if the guard is killed, and
//!   the agent thaws if both are, at its next start at the latest.
//! - **One experiment at a time** on a machine: [`RuntimeDir::lock`], which command and guard hold. A file belongs to one guard, and is
//!   removed for that guard only, after it was thawed and the guard can freeze nothing any more.
//! - The file of the guard is trusted only if it belongs to root or to this user, and nothing but the thawed state is ever written because
//!   of it.
//!
//! Which cgroups may be frozen is not decided here, except that a guard refuses a cgroup that contains itself.

mod freezer;
mod guard;
mod handle;
mod runtime_dir;
mod watch;

pub use self::freezer::{Freezer, FreezerError, contains_process};
pub use self::guard::{GuardOptions, GuardReply, GuardRequest, run as run_guard};
pub use self::handle::GuardHandle;
pub use self::runtime_dir::{ExperimentLock, RuntimeDir};
pub use self::watch::{ThawWatch, recover};
