//! Connects the parts of the agent: threads, channels, tasks, shutdown.
//!
//! The core thread owns identity, attribution and aggregation, and drains both kernel rings itself. Observations of the GPU threads and
//! queries reach it through its inbox.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::Context as _;
use arc_swap::ArcSwap;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use sampler_core::aggregate::Settings;
use sampler_core::pipeline::Core;
use sampler_core::snapshot::Snapshot;
use tokio::net::TcpListener;
use tokio::sync::watch;

use crate::config::Config;
use crate::core_thread::CoreThread;
use crate::error::display_chain;
use crate::export::ledger::Ledger;
use crate::export::rejections::Rejections;
use crate::export::server;
use crate::export::state::AppState;
use crate::freeze::{RuntimeDir, ThawWatch};
use crate::health::Health;
use crate::health::condition::Condition;
use crate::inbox::inbox;
use crate::labels::{self, LabelConfig, LabelService};
use crate::objects::Objects;
use crate::observe::clock::wall_now;
use crate::observe::gpu;
use crate::observe::kernel::layout::{Layout, layout};
use crate::observe::kernel::probe::{self, Chosen, KernelAccess};
use crate::observe::kernel::{Mode, Tracker, pid_namespace};
use crate::observe::pressure;
use crate::observe::waits::{self, Requester, SelectProcesses, WaitRequests};
use crate::otlp::{self, OtlpExporter, OtlpSettings};
use crate::privileges;
use crate::reload::{self, SettingsSource};
use crate::security::Security;
use crate::service_notify::ServiceNotifier;
use crate::serving::find::EngineFinder;
use crate::serving::sockets::{NamespaceHelper, NamespaceSockets};
use crate::serving::{self, EngineRequest, ServingInputs};
use crate::session::{Recorder, SessionInputs, Store, Uploader};

/// Maximum number of open files that is asked for: connections, kept files, rings and sockets stay below 10,000.
const MAX_DESCRIPTORS: u64 = 65_536;
/// Time limit for IO tasks to end.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(2);

/// Selects the best working kernel mode, and reports its limitations once.
fn tracker(config: &Config, layout: &Layout, health: &Health) -> anyhow::Result<Tracker> {
    if let Some(problem) = pid_namespace::problem() {
        health.degraded(Condition::PidNamespace, &problem);
    }
    if let Some(problem) = layout.problem() {
        health.degraded(Condition::Cgroups, &problem);
    }
    let access = KernelAccess {
        btf: &config.btf(),
        procfs: &config.path_procfs,
        sysfs: &config.path_sysfs,
        ring_bytes: config.kernel_ring_bytes,
    };
    let Chosen { tracker, refused } = probe::choose(config.kernel_mode, layout, &access)?;
    let mode = tracker.mode();
    health.update(|view| view.kernel_mode = mode.name());
    if mode == Mode::RawTracepoint {
        tracing::info!("kernel mode raw_tracepoint: all changes of processes and cgroups are tracked");
    } else {
        let reasons = refused.into_iter().map(|(mode, error)| format!("; no {}: {}", mode.name(), display_chain(&error)));
        let reasons: String = reasons.collect();
        health.degraded(Condition::KernelMode, &format!("kernel mode {}: {}{reasons}", mode.name(), mode.limitations()));
    }
    Ok(tracker)
}

fn recorder(
    config: &Config,
    labels: &LabelService,
    snapshot: &Arc<ArcSwap<Snapshot>>,
    waits: WaitRequests,
    engines: watch::Sender<Option<Arc<EngineRequest>>>,
) -> anyhow::Result<Recorder> {
    let store = Store::new(config.session_dir.clone(), config.session_dir_max_bytes);
    let labels = labels.clone();
    let sources = SessionInputs {
        labels: Box::new(move || labels.view()),
        snapshot: Arc::clone(snapshot),
        procfs: config.path_procfs.clone(),
        waits,
        saturation_percent: config.gpu_saturation_percent,
        node: config.node_of_sessions(),
        engines,
    };
    Recorder::spawn(store, sources, config.session_ring_bytes)
}

/// Selects processes for wait probes by the labels of their containers.
fn select_processes(labels: LabelService) -> SelectProcesses {
    Box::new(move |selectors, mut processes| {
        let labels = labels.view();
        processes.retain(|process| {
            let labels = process.user.container().and_then(|key| labels.get(&key));
            selectors.iter().any(|selector| selector.selects(process, labels.map(|labels| &**labels)))
        });
        processes
    })
}

/// Raises the soft limit of open files, which is often 1,024, as far as the hard limit allows. Returns the present one. Nothing here uses
/// `select`, which fails with more.
fn raise_descriptor_limit() -> usize {
    let limit = getrlimit(Resource::Nofile);
    let wanted = limit.maximum.unwrap_or(u64::MAX).min(MAX_DESCRIPTORS).max(limit.current.unwrap_or(u64::MAX));
    let raised = Rlimit { current: Some(wanted), maximum: limit.maximum };
    // Refused only by a security module; fewer files are kept open then.
    let present = if setrlimit(Resource::Nofile, raised).is_ok() { Some(wanted) } else { limit.current };
    present.map_or(usize::MAX, |present| usize::try_from(present).unwrap_or(usize::MAX))
}

/// The text that `systemctl status` shows.
fn status(config: &Config, health: &Health, snapshot: &Snapshot) -> String {
    let view = health.view();
    let degraded: Vec<_> = view.degraded.iter().map(|(condition, _)| condition.key()).collect();
    let degraded = if degraded.is_empty() { String::new() } else { format!("; degraded: {}", degraded.join(", ")) };
    format!("listening on {}; kernel mode {}; {} GPUs{degraded}", config.listen, view.kernel_mode, snapshot.gpus.len())
}

/// Runs the agent until SIGINT or SIGTERM.
pub fn run(source: SettingsSource) -> anyhow::Result<()> {
    let config = source.config()?;
    config.check_security()?;
    let otlp = otlp::settings()?;
    // The port is bound first, so that this error is reported before anything is loaded, and with the right to a port below 1024.
    let listener = server::bind(config.listen)?;
    let namespace_helper = namespace_helper(&config)?;
    // Before the first thread: each thread has its own.
    let restricted = privileges::restrict(config.kept_capabilities, config.seccomp);
    restricted.log();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("sampler-io")
        .enable_all()
        .build()
        .context("cannot start the IO runtime")?;
    let result = runtime.block_on(async {
        let listener = TcpListener::from_std(listener).context("cannot wait for connections")?;
        let surroundings =
            Surroundings { source: Some(source), notifier: ServiceNotifier::from_environment(), otlp, namespace_helper };
        serve(Arc::new(config), surroundings, listener, signalled()).await
    });
    // A file read may hang in the kernel and must not keep the agent from ending.
    runtime.shutdown_timeout(SHUTDOWN_GRACE);
    result
}

/// What an agent of its own has, and one within a command does not.
#[derive(Default)]
pub struct Surroundings {
    /// SIGHUP reads the settings again.
    pub source: Option<SettingsSource>,
    pub notifier: Option<ServiceNotifier>,
    pub otlp: Option<OtlpSettings>,
    /// Enters the network namespaces of containers, if the settings ask for it.
    pub namespace_helper: Option<Arc<NamespaceHelper>>,
}

/// Must be called before privileges are given up.
pub fn namespace_helper(config: &Config) -> anyhow::Result<Option<Arc<NamespaceHelper>>> {
    if !config.engine_access {
        return Ok(None);
    }
    let helper = NamespaceHelper::start(config.seccomp)
        .context("cannot start the helper that enters network namespaces; set engine_access = false to run without it")?;
    if let Err(error) = helper.check() {
        let error = display_chain(&error);
        tracing::warn!(error, "metrics of serving engines in network namespaces of their own cannot be read");
    }
    Ok(Some(helper))
}

/// Runs the agent until `stop_requested`.
pub async fn serve(
    config: Arc<Config>,
    surroundings: Surroundings,
    listener: TcpListener,
    stop_requested: impl Future<Output = ()>,
) -> anyhow::Result<()> {
    let Surroundings { source, notifier, otlp, namespace_helper } = surroundings;
    let descriptors = raise_descriptor_limit();
    let started = wall_now();
    let health = Arc::new(Health::default());
    let objects = config.session_store.clone().map(Objects::open).transpose()?;
    let security = Security::new(config.security_files(), Arc::clone(&health), wall_now)?;
    let stop = Arc::new(AtomicBool::new(false));
    let snapshot = Arc::new(ArcSwap::from_pointee(Snapshot::default()));
    let (to_core, inbox) = inbox().context("cannot create an event descriptor")?;
    let (to_labels, container_events) = tokio::sync::mpsc::unbounded_channel();
    let layout = layout(&config.path_procfs);
    let cgroup_layout = layout.name();
    let labels = labels::spawn(LabelConfig::new(&config, &layout), container_events).context("cannot start the label service")?;
    let tracker = tracker(&config, &layout, &health)?;
    let gpus = gpu::start(&config, Arc::new(gpu::Context::new(&config, &to_core, &health, &stop)?))?;
    let pressure_context = pressure::WorkerContext {
        to: to_core.clone(),
        health: Arc::clone(&health),
        snapshot: Arc::clone(&snapshot),
        stop: Arc::clone(&stop),
    };
    let pressure = pressure::start(&layout, &config.path_procfs, descriptors, pressure_context)
        .context("cannot start the thread pressure")?;
    let wait_requests = WaitRequests::default();
    if let Some(selector) = config.wait_probes.clone() {
        wait_requests.set(Requester::Setting, selector);
    }
    let waits = waits::start(waits::WaitContext {
        to: to_core.clone(),
        health: Arc::clone(&health),
        select: select_processes(labels.clone()),
        requests: wait_requests.clone(),
        procfs: config.path_procfs.clone(),
        budget: config.wait_probe_budget,
        stop: Arc::clone(&stop),
    })
    .context("cannot start the thread waits")?;
    let (want_engines, engine_requests) = watch::channel(None);
    let recorder = recorder(&config, &labels, &snapshot, wait_requests, want_engines)?;
    let serving = ServingInputs {
        core: to_core.clone(),
        snapshot: Arc::clone(&snapshot),
        finder: EngineFinder {
            procfs: config.path_procfs.clone(),
            mounts: layout.mounts().map(|(_, mount)| mount.to_path_buf()).collect(),
        },
        sockets: NamespaceSockets { procfs: config.path_procfs.clone(), helper: namespace_helper },
    };
    tokio::spawn(serving::run(serving, engine_requests));
    let thaw_watch = ThawWatch {
        runtime_dir: RuntimeDir::new(&config.runtime_dir),
        layout: layout.clone(),
        procfs: config.path_procfs.clone(),
        stop: Arc::clone(&stop),
    };
    thaw_watch.start().context("cannot start the thread thaw-watch")?;
    let saturation_ratio = f64::from(config.gpu_saturation_percent) / 100.0;
    let settings = Settings { saturation_ratio, ..Settings::default() };
    let core = CoreThread {
        core: Core::new(settings, true),
        config: Arc::clone(&config),
        layout,
        tracker,
        inbox,
        health: Arc::clone(&health),
        snapshot: Arc::clone(&snapshot),
        containers: to_labels,
        stop: Arc::clone(&stop),
        start_over: false,
        recorder: recorder.clone(),
    };
    // Dropped when the core thread ends, also by a panic: without it the agent would serve outdated results.
    let (core_alive, core_ended) = tokio::sync::oneshot::channel::<()>();
    let core = std::thread::Builder::new()
        .name("core".into())
        .spawn(move || {
            let _alive = core_alive;
            core.run();
        })
        .context("cannot start the core thread")?;

    let listing = recorder.clone();
    tokio::spawn(async move {
        if let Err(error) = listing.list_earlier().await {
            tracing::warn!(error = display_chain(&error), "cannot list sessions of earlier runs");
        }
    });
    if let Some(objects) = objects {
        tokio::spawn(Uploader::new(objects, config.node_of_sessions(), recorder.store(), Arc::clone(&health)).run());
    }
    if let Some(notifier) = notifier.clone() {
        let (config, health, snapshot) = (Arc::clone(&config), Arc::clone(&health), Arc::clone(&snapshot));
        tokio::spawn(notifier.report(Arc::clone(&health), move || status(&config, &health, &snapshot.load())));
    }
    let state = AppState {
        config: ArcSwap::new(Arc::clone(&config)),
        security,
        rejections: Rejections::default(),
        snapshot,
        labels,
        pressure,
        health,
        ledger: Mutex::new(Ledger::new(started)),
        page_sizes: ArcSwap::default(),
        core: to_core,
        recorder: recorder.clone(),
        gpus,
        started,
        node: config.node(),
    };
    let scheme = if state.security.rules().tls().is_some() { "https" } else { "http" };
    tracing::info!(url = format!("{scheme}://{}/metrics", config.listen), cgroups = cgroup_layout, "serving");
    let state = Arc::new(state);
    if let Some(source) = source {
        tokio::spawn(reload::on_hangup(source, Arc::clone(&state), notifier.clone()));
    }
    // Dropped when the server ends.
    let (exporting, exports_ended) = tokio::sync::watch::channel(());
    let exporter = match otlp {
        Some(settings) => {
            let exporter = OtlpExporter::new(settings, Arc::clone(&state)).context("cannot export metrics by OTLP")?;
            Some(tokio::spawn(exporter.run(exports_ended)))
        }
        None => None,
    };
    let served = server::serve(listener, state, async {
        tokio::select! {
            () = stop_requested => {}
            _ = core_ended => tracing::error!("the core thread ended"),
        }
        if let Some(notifier) = notifier {
            notifier.stopping();
        }
    })
    .await;
    drop(exporting);
    if let Some(exporter) = exporter {
        // The last values; a receiver that hangs must not keep the agent running.
        let _ended = tokio::time::timeout(SHUTDOWN_GRACE, exporter).await;
    }
    stop.store(true, Ordering::Relaxed);
    // A poller may hang in a driver call: only the core thread is waited for.
    if core.join().is_err() {
        anyhow::bail!("the core thread panicked; please report the log above");
    }
    // A disk may hang: sessions that do not end within the limit are interrupted.
    recorder.close(SHUTDOWN_GRACE);
    waits.end(SHUTDOWN_GRACE);
    served.map_err(Into::into)
}

async fn signalled() {
    use tokio::signal::unix::{SignalKind, signal};
    let terminate = async {
        match signal(SignalKind::terminate()) {
            Ok(mut stream) => {
                stream.recv().await;
            }
            Err(error) => {
                tracing::warn!(%error, "cannot handle SIGTERM");
                std::future::pending::<()>().await;
            }
        }
    };
    tokio::select! {
        () = terminate => {}
        result = tokio::signal::ctrl_c() => {
            if let Err(error) = result {
                tracing::warn!(%error, "cannot handle SIGINT");
            }
        }
    }
    tracing::info!("stopping");
}
