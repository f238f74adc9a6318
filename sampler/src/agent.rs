//! The only wiring: threads, channels, tasks, shutdown.
//!
//! The core thread owns identity, attribution and aggregation, and drains both kernel rings itself. GPU threads send batches
//! over a channel; a batch is attributed only after the rings were drained past its receipt.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use arc_swap::ArcSwap;
use nvml_wrapper::Nvml;
use sampler_core::aggregate::Core;
use sampler_core::identity::ContainerChange;
use sampler_core::observation::Observation;
use sampler_core::snapshot::Snapshot;
use tokio::sync::mpsc::UnboundedSender;

use crate::config::{Config, KernelMode};
use crate::export::http::{self, AppState};
use crate::health::Health;
use crate::labels::{self, ContainerEvent, LabelConfig};
use crate::observe::clock::{boot_now, wall_now};
use crate::observe::kernel::{Program, scan};
use crate::observe::{gpu, kernel};

/// The rings are drained at least this often; they hold seconds of the worst storm.
const DRAIN_EVERY: Duration = Duration::from_millis(20);
const PUBLISH_EVERY: Duration = Duration::from_millis(250);
/// Without kernel events, /proc and cgroupfs are looked at this often.
const RESCAN_EVERY: Duration = Duration::from_secs(1);
/// How often to look again for a driver library that was missing.
const NVML_RETRY: Duration = Duration::from_secs(10);
/// What IO tasks get to end in.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(2);

struct CoreThread {
    core: Core,
    config: Arc<Config>,
    layout: scan::Layout,
    program: Option<Program>,
    inbox: Receiver<Observation>,
    health: Arc<Health>,
    snapshot: Arc<ArcSwap<Snapshot>>,
    containers: UnboundedSender<ContainerEvent>,
    stop: Arc<AtomicBool>,
}

impl CoreThread {
    fn run(mut self) {
        self.rescan();
        self.drain();
        self.publish();
        self.health.set_ready();
        let mut published = Instant::now();
        let mut scanned = Instant::now();
        let mut lost = 0;
        while !self.stop.load(Ordering::Relaxed) {
            let received = match self.inbox.recv_timeout(DRAIN_EVERY) {
                Ok(observation) => Some(observation),
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => {
                    std::thread::sleep(DRAIN_EVERY);
                    None
                }
            };
            self.drain();
            if let Some(observation) = received {
                self.core.observe(observation);
            }
            if published.elapsed() >= PUBLISH_EVERY {
                published = Instant::now();
                self.publish();
                let now_lost: u64 = self.program.as_ref().map_or(0, |p| p.lost().iter().sum());
                let due = self.program.is_none() && scanned.elapsed() >= RESCAN_EVERY;
                if due || now_lost > lost {
                    if now_lost > lost {
                        self.health.resynced();
                    }
                    lost = now_lost;
                    scanned = Instant::now();
                    self.rescan();
                }
            }
        }
    }

    fn rescan(&mut self) {
        let core = &mut self.core;
        for problem in scan::scan(&self.config.path_procfs, &self.layout, boot_now(), |o| core.observe(o)) {
            self.health.degraded("scan", &problem);
        }
    }

    fn drain(&mut self) {
        if let Some(program) = &mut self.program {
            let core = &mut self.core;
            program.rings.drain(|o| core.observe(o));
        }
        for change in self.core.take_container_changes() {
            let event = match change {
                ContainerChange::Appeared(record) => ContainerEvent::Appeared(record),
                ContainerChange::Gone(key, at) => ContainerEvent::Gone(key, at),
            };
            // The label service ends only with the process.
            if self.containers.send(event).is_err() {
                return;
            }
        }
    }

    fn publish(&mut self) {
        self.core.observe(Observation::Tick { at: boot_now(), wall: wall_now() });
        if let Some(program) = &self.program {
            self.health.kernel_events(&program.rings.seen, &program.lost());
        }
        self.snapshot.store(Arc::new(self.core.snapshot()));
    }
}

/// The initial pid namespace has this inode (PROC_PID_INIT_INO): in any other, the driver's pids name other processes.
const INIT_PID_NAMESPACE: &str = "pid:[4026531836]";

/// Loads the kernel program, or says why not and leaves the agent to /proc.
fn kernel_program(config: &Config, layout: &scan::Layout, health: &Health) -> anyhow::Result<Option<Program>> {
    match std::fs::read_link("/proc/self/ns/pid") {
        Ok(link) if link.as_os_str() != INIT_PID_NAMESPACE => health.degraded(
            "pid-namespace",
            "not in the host's pid namespace: the driver's pids cannot be matched; run with hostPID: true or --pid=host",
        ),
        Ok(_) => {}
        Err(error) => health.degraded("pid-namespace", &format!("cannot tell the pid namespace: /proc/self/ns/pid: {error}")),
    }
    if config.kernel_mode == KernelMode::Procfs {
        health.set_kernel_mode("procfs");
        return Ok(None);
    }
    let btf = config.path_sysfs.join("kernel/btf/vmlinux");
    match kernel::load(layout.v1.as_ref().map(|(name, id, _)| (*name, *id)), &btf) {
        Ok(program) => {
            health.set_kernel_mode("raw_tracepoint");
            Ok(Some(program))
        }
        Err(error) if config.kernel_mode == KernelMode::RawTracepoint => Err(error.into()),
        Err(error) => {
            health.set_kernel_mode("procfs");
            let error = anyhow::Error::from(error);
            let message =
                format!("no kernel events, looking at /proc once a second instead, short processes are missed: {error:#}");
            health.degraded("kernel", &message);
            Ok(None)
        }
    }
}

fn nvml_found(health: &Health, gpus: usize) {
    health.set_nvml(true);
    health.recovered("nvml", "the NVIDIA driver answers");
    tracing::info!(gpus, "sampling");
}

/// Opens NVML now, or keeps trying: a node may get its driver after its agent.
fn start_gpus(config: &Config, to: &Sender<Observation>, health: &Arc<Health>, stop: &Arc<AtomicBool>) -> anyhow::Result<()> {
    let attempt = |lib: Option<&std::path::Path>| -> Result<usize, gpu::GpuError> {
        // Pollers borrow it for the life of the process.
        let nvml: &'static Nvml = Box::leak(Box::new(gpu::open(lib)?));
        gpu::start(nvml, to, health, stop)
    };
    let lib = config.nvml_lib.clone();
    match attempt(lib.as_deref()) {
        Ok(count) => {
            nvml_found(health, count);
            Ok(())
        }
        // A library named on purpose and unusable is a mistake to fix, not a state to wait in.
        Err(error) if lib.is_some() => Err(error.into()),
        Err(error) => {
            health.set_nvml(false);
            let error = anyhow::Error::from(error);
            health.degraded("nvml", &format!("no GPU can be read, trying again every {} s: {error:#}", NVML_RETRY.as_secs()));
            let (to, health, stop) = (to.clone(), Arc::clone(health), Arc::clone(stop));
            std::thread::Builder::new()
                .name("nvml-wait".into())
                .spawn(move || {
                    while !stop.load(Ordering::Relaxed) {
                        std::thread::sleep(NVML_RETRY);
                        let Ok(nvml) = gpu::open(None) else { continue };
                        let nvml: &'static Nvml = Box::leak(Box::new(nvml));
                        match gpu::start(nvml, &to, &health, &stop) {
                            Ok(count) => nvml_found(&health, count),
                            Err(error) => health.degraded("nvml", &error.to_string()),
                        }
                        return;
                    }
                })
                .context("cannot start the thread that waits for the NVIDIA driver")?;
            Ok(())
        }
    }
}

/// Runs the agent until SIGINT or SIGTERM.
pub fn run(config: Config) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("sampler-io")
        .enable_all()
        .build()
        .context("cannot start the IO runtime")?;
    let result = runtime.block_on(serve(Arc::new(config)));
    // A file read may hang in the kernel; it must not keep the agent.
    runtime.shutdown_timeout(SHUTDOWN_GRACE);
    result
}

async fn serve(config: Arc<Config>) -> anyhow::Result<()> {
    // The port first: an agent that cannot be scraped should say so before it loads anything.
    let listener = http::bind(config.listen).await?;
    let health = Arc::new(Health::default());
    let stop = Arc::new(AtomicBool::new(false));
    let snapshot = Arc::new(ArcSwap::from_pointee(Snapshot::default()));
    let (to_core, inbox) = channel();
    let (to_labels, container_events) = tokio::sync::mpsc::unbounded_channel();
    let labels = labels::spawn(
        LabelConfig {
            rootfs: config.path_rootfs.clone(),
            docker_socket: config.docker_socket.clone(),
            sources: config.label_sources,
            now: boot_now,
        },
        container_events,
    );

    let layout = scan::layout(&config.path_procfs);
    let cgroup_layout = layout.name();
    let program = kernel_program(&config, &layout, &health)?;
    start_gpus(&config, &to_core, &health, &stop)?;
    let core = CoreThread {
        core: Core::default(),
        config: Arc::clone(&config),
        layout,
        program,
        inbox,
        health: Arc::clone(&health),
        snapshot: Arc::clone(&snapshot),
        containers: to_labels,
        stop: Arc::clone(&stop),
    };
    // Dropped when the core thread ends, also by a panic: an agent without it must not go on serving what was once true.
    let (core_lives, core_ended) = tokio::sync::oneshot::channel::<()>();
    let core = std::thread::Builder::new()
        .name("core".into())
        .spawn(move || {
            let _lives = core_lives;
            core.run();
        })
        .context("cannot start the core thread")?;

    let state = Arc::new(AppState::new(Arc::clone(&config), snapshot, labels, Arc::clone(&health)));
    tracing::info!(url = format!("http://{}/metrics", config.listen), cgroups = cgroup_layout, "serving");
    let served = http::serve(listener, state, shutdown(core_ended)).await;
    stop.store(true, Ordering::Relaxed);
    // A poller may hang in a driver call: only the core thread is waited for.
    if core.join().is_err() {
        anyhow::bail!("the core thread panicked; please report what the log shows above");
    }
    served.map_err(Into::into)
}

async fn shutdown(core_ended: tokio::sync::oneshot::Receiver<()>) {
    use tokio::signal::unix::{SignalKind, signal};
    let terminate = async {
        match signal(SignalKind::terminate()) {
            Ok(mut stream) => {
                stream.recv().await;
            }
            Err(error) => {
                tracing::warn!(%error, "SIGTERM cannot be listened to");
                std::future::pending::<()>().await;
            }
        }
    };
    tokio::select! {
        () = terminate => {}
        _ = core_ended => tracing::error!("the core thread ended"),
        result = tokio::signal::ctrl_c() => {
            if let Err(error) = result {
                tracing::warn!(%error, "SIGINT cannot be listened to");
            }
        }
    }
    tracing::info!("stopping");
}
