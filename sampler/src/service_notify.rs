//! Reports the agent's state to the service manager, as sd_notify(3) describes: datagrams to the socket that `NOTIFY_SOCKET` names.
//!
//! ```text
//!  start -> first scan merged -> READY=1 -> WATCHDOG=1 at a quarter of the unit's WatchdogSec -> STOPPING=1
//!                                   ^          only if the core thread made a turn since the last one
//!                                   +--- RELOADING=1 (SIGHUP)
//! ```
//!
//! Ready is what `/readyz` is: requests are served and the first scan is merged, so that a unit that is ordered after this one gets every
//! container. GPUs are not waited for: a node without a working driver has a running agent that reports the reason.
//!
//! The watchdog covers the core thread and the IO runtime, which sends the datagrams. GPU threads are not part of it, because a driver call
//! may hang and a restart does not help. Without `NOTIFY_SOCKET` there is neither a socket nor a task.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

use crate::health::Health;

/// How often readiness is checked until the first scan is merged.
const READY_EVERY: Duration = Duration::from_millis(20);
/// How often the status text is compared with the last one where the unit has no watchdog.
const STATUS_EVERY: Duration = Duration::from_secs(10);

/// A connection to the service manager. Copies share it.
#[derive(Clone)]
pub struct ServiceNotifier {
    socket: Arc<UnixDatagram>,
    /// The unit's `WatchdogSec`, if the watchdog is meant for this process.
    watchdog: Option<Duration>,
}

impl ServiceNotifier {
    /// The service manager that started this process, if one expects notifications. A socket that cannot be used is logged.
    pub fn from_environment() -> Option<Self> {
        let address = std::env::var_os("NOTIFY_SOCKET").filter(|address| !address.is_empty())?;
        let watchdog = watchdog(std::env::var_os("WATCHDOG_USEC"), std::env::var_os("WATCHDOG_PID"), std::process::id());
        match Self::connect(&address, watchdog) {
            Ok(notifier) => Some(notifier),
            Err(error) => {
                tracing::warn!(%error, socket = %address.display(), "cannot connect to NOTIFY_SOCKET: the service manager gets no state");
                None
            }
        }
    }

    /// `address`: a path, or `@` and the name of an abstract socket.
    fn connect(address: &OsStr, watchdog: Option<Duration>) -> io::Result<Self> {
        let socket = UnixDatagram::unbound()?;
        let address = match address.as_bytes().strip_prefix(b"@") {
            Some(name) => SocketAddr::from_abstract_name(name)?,
            None => SocketAddr::from_pathname(Path::new(address))?,
        };
        socket.connect_addr(&address)?;
        // A service manager that does not read must not delay the agent.
        socket.set_nonblocking(true)?;
        Ok(Self { socket: Arc::new(socket), watchdog })
    }

    fn send(&self, state: &str) {
        if let Err(error) = self.socket.send(state.as_bytes()) {
            tracing::warn!(%error, state, "cannot notify the service manager");
        }
    }

    /// Reports readiness, then the watchdog's signs of life and changes of `status`, until it is dropped.
    pub async fn report(self, health: Arc<Health>, status: impl Fn() -> String) {
        while !health.ready() {
            tokio::time::sleep(READY_EVERY).await;
        }
        let mut sent = status();
        let mut turns = health.core_turns();
        self.send(&format!("READY=1\nSTATUS={sent}"));
        let mut ticks = tokio::time::interval(self.watchdog.map_or(STATUS_EVERY, |watchdog| watchdog / 4));
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let status = status();
            // After the status, so that a turn that changes it is reported no later than it.
            let now = health.core_turns();
            if self.watchdog.is_some() && now != turns {
                self.send("WATCHDOG=1");
            }
            turns = now;
            if status != sent {
                self.send(&format!("STATUS={status}"));
                sent = status;
            }
        }
    }

    /// Reports that the agent reads its configuration again, calls `reload`, and reports that it is ready again.
    pub fn reloading<T>(&self, reload: impl FnOnce() -> T) -> T {
        self.send(&reloading_message());
        let result = reload();
        self.send("READY=1");
        result
    }

    pub fn stopping(&self) {
        self.send("STOPPING=1\nSTATUS=stopping");
    }
}

/// `Type=notify-reload` of systemd 253 and newer compares the time with that of its signal.
fn reloading_message() -> String {
    let now = clock_gettime(ClockId::Monotonic);
    let microseconds = now.tv_sec.cast_unsigned() * 1_000_000 + now.tv_nsec.cast_unsigned() / 1_000;
    format!("RELOADING=1\nMONOTONIC_USEC={microseconds}")
}

/// The watchdog's time from its two variables, unless it is meant for another process.
fn watchdog(microseconds: Option<OsString>, pid: Option<OsString>, own_pid: u32) -> Option<Duration> {
    let number = |text: OsString| text.to_str().and_then(|text| text.parse::<u64>().ok());
    if let Some(pid) = pid
        && number(pid) != Some(u64::from(own_pid))
    {
        return None;
    }
    number(microseconds?).filter(|microseconds| *microseconds > 0).map(Duration::from_micros)
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    /// A socket of a service manager, and an agent that is connected to it.
    struct Manager {
        socket: UnixDatagram,
        health: Arc<Health>,
        notifier: ServiceNotifier,
        _folder: tempfile::TempDir,
    }

    impl Manager {
        fn new(watchdog: Option<Duration>) -> Self {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("notify");
            let socket = UnixDatagram::bind(&path).unwrap();
            socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
            let notifier = ServiceNotifier::connect(path.as_os_str(), watchdog).unwrap();
            Self { socket, health: Arc::default(), notifier, _folder: folder }
        }

        fn received(&self) -> String {
            let mut buffer = [0; 512];
            let length = self.socket.recv(&mut buffer).expect("a datagram within 20 s");
            String::from_utf8(buffer[..length].to_vec()).unwrap()
        }

        fn is_silent_for(&self, time: Duration) -> bool {
            self.socket.set_read_timeout(Some(time)).unwrap();
            let silent = self.socket.recv(&mut [0; 512]).is_err();
            self.socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
            silent
        }

        /// Runs the task of the agent on a runtime of its own.
        fn start(&self, status: impl Fn() -> String + Send + 'static) -> tokio::runtime::Runtime {
            let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_time().build().unwrap();
            runtime.spawn(self.notifier.clone().report(Arc::clone(&self.health), status));
            runtime
        }
    }

    #[test]
    fn ready_is_sent_once_the_first_scan_is_merged() {
        let manager = Manager::new(None);
        let _runtime = manager.start(|| "serving".to_owned());
        assert!(manager.is_silent_for(Duration::from_millis(200)));
        manager.health.set_ready();
        assert_eq!(manager.received(), "READY=1\nSTATUS=serving");
        assert!(manager.is_silent_for(Duration::from_millis(200)), "without a watchdog nothing follows");
        manager.notifier.stopping();
        assert_eq!(manager.received(), "STOPPING=1\nSTATUS=stopping");
    }

    #[test]
    fn the_watchdog_gets_signs_of_life_only_while_the_core_makes_turns() {
        let watchdog = Duration::from_millis(400);
        let manager = Manager::new(Some(watchdog));
        let _runtime = manager.start(String::new);
        manager.health.set_ready();
        assert_eq!(manager.received(), "READY=1\nSTATUS=");
        assert!(manager.is_silent_for(watchdog), "no turn was made");
        let until = Instant::now() + watchdog * 2;
        let mut signs = 0;
        while Instant::now() < until {
            manager.health.core_turned();
            if !manager.is_silent_for(Duration::from_millis(10)) {
                signs += 1;
            }
        }
        assert!((2..=9).contains(&signs), "{signs} signs in two periods");
        // The one that may have been under way.
        manager.is_silent_for(watchdog);
        assert!(manager.is_silent_for(watchdog), "the core has stopped");
    }

    #[test]
    fn a_changed_status_is_sent_once() {
        let manager = Manager::new(Some(Duration::from_millis(40)));
        let health = Arc::clone(&manager.health);
        let _runtime = manager.start(move || format!("turns {}", health.core_turns()));
        manager.health.set_ready();
        assert_eq!(manager.received(), "READY=1\nSTATUS=turns 0");
        manager.health.core_turned();
        assert_eq!(manager.received(), "WATCHDOG=1");
        assert_eq!(manager.received(), "STATUS=turns 1");
        assert!(manager.is_silent_for(Duration::from_millis(200)));
    }

    #[test]
    fn abstract_sockets_are_reached() {
        let name = format!("gpu-sampler-test-{}", std::process::id());
        let socket = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
        ServiceNotifier::connect(OsStr::new(&format!("@{name}")), None).unwrap().stopping();
        let mut buffer = [0; 64];
        let length = socket.recv(&mut buffer).unwrap();
        assert_eq!(&buffer[..length], b"STOPPING=1\nSTATUS=stopping");
    }

    #[test]
    fn reloading_has_the_monotonic_time() {
        let message = reloading_message();
        let microseconds: u64 = message.strip_prefix("RELOADING=1\nMONOTONIC_USEC=").unwrap().parse().unwrap();
        let now = clock_gettime(ClockId::Monotonic).tv_sec.cast_unsigned() * 1_000_000;
        assert!(microseconds.abs_diff(now) < 60_000_000, "{microseconds} {now}");
    }

    #[test]
    fn the_watchdog_of_another_process_is_ignored() {
        let check = |microseconds: Option<&str>, pid: Option<&str>, expect: Option<u64>| {
            let found = watchdog(microseconds.map(Into::into), pid.map(Into::into), 7);
            assert_eq!(found, expect.map(Duration::from_micros), "{microseconds:?} {pid:?}");
        };
        check(Some("30000000"), Some("7"), Some(30_000_000));
        check(Some("30000000"), None, Some(30_000_000));
        check(Some("30000000"), Some("8"), None);
        check(Some("0"), Some("7"), None);
        check(Some("soon"), None, None);
        check(None, Some("7"), None);
    }
}
