//! A process that uses a GPU through the CUDA driver, with kernels of a stated length.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use cuda_sim::gpu;
use cuda_sim::wait_log::{OF_CALLER, WaitLog};
use nvidia_ml_sim::time;
use serde::Serialize;

use crate::driver::{self, Cuda, Object};
use crate::ended_thread;
use crate::install;
use crate::pace::{Pace, Phase, Timetable, phase};

/// Between two writes of the caller's records.
const WRITE_INTERVAL: Duration = Duration::from_millis(20);

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// cuStreamSynchronize
    Block,
    /// cuStreamQuery until the work is done
    Spin,
    /// cuEventSynchronize
    Event,
    /// cuCtxSynchronize
    Ctx,
    /// cuMemcpyDtoH in the default stream
    Copy,
    /// cuGraphLaunch, then cuStreamSynchronize
    Graph,
    /// cuStreamSynchronize without any work
    Empty,
}

#[derive(clap::Args)]
pub struct Options {
    #[arg(long)]
    dir: PathBuf,
    /// Index of the GPU
    #[arg(long, default_value_t = 0)]
    gpu: usize,
    /// Length of a kernel, such as 4ms
    #[arg(long, value_parser = time::span, required_unless_present = "rate")]
    kernel: Option<Duration>,
    /// Launch a kernel in each period, such as 20ms
    #[arg(long, value_parser = time::span, required_unless_present_any = ["back_to_back", "rate"])]
    every: Option<Duration>,
    /// Launch the next kernel when the last one has ended
    #[arg(long, conflicts_with_all = ["every", "rate"])]
    back_to_back: bool,
    /// Calls a second, of all threads together
    #[arg(long, conflicts_with = "every")]
    rate: Option<f64>,
    /// How the end of the work is waited for
    #[arg(long, value_enum, default_value = "block")]
    mode: Mode,
    /// Threads, each with a stream of its own
    #[arg(long, default_value_t = 1)]
    threads: usize,
    /// End after this long
    #[arg(long = "for", value_parser = time::span)]
    lasts: Duration,
    /// Work and pause in turn, from the begin on, such as 3s:2s
    #[arg(long, value_parser = phase, value_name = "ON:OFF")]
    phase: Option<Phase>,
    /// After init, fork a child that initialises CUDA again and does the same
    #[arg(long)]
    fork_after_init: bool,
    /// A further thread waits for kernels, and SIGUSR1 ends it inside a call. The truth of this process has it waiting from then on
    #[arg(long, conflicts_with = "fork_after_init")]
    end_thread_on_usr1: bool,
    /// Begin at this time, so that several processes have the same periods; RFC 3339
    #[arg(long, value_parser = time::parse)]
    static_start: Option<u64>,
    /// The CUDA library; default: lib/libcuda.so.1 in the folder. NVML_SIM_DIR must name the folder if the library is elsewhere
    #[arg(long)]
    library: Option<PathBuf>,
}

/// What a process did, by its own clock.
#[derive(Debug, Default, Serialize)]
struct Done {
    launches: u64,
    /// Blocking calls; with `spin` the waits, which are many calls each.
    calls: u64,
    /// Time inside them, summed over threads.
    wait_total_seconds: f64,
}

#[derive(Serialize)]
struct Summary {
    pid: u32,
    start_time: u64,
    mode: Mode,
    #[serde(flatten)]
    done: Done,
}

pub fn run(options: &Options) -> anyhow::Result<()> {
    let library = options.library.clone().unwrap_or_else(|| install::installed(&options.dir));
    if options.library.is_none() && !library.exists() {
        install::install(&options.dir, None)?;
    }
    if options.end_thread_on_usr1 {
        ended_thread::prepare()?;
    }
    let cuda = Cuda::open(&library)?;
    cuda.init()?;
    let context = cuda.create_context(options.gpu)?;
    if options.end_thread_on_usr1 {
        ended_thread::start(library, context)?;
    }
    if !options.fork_after_init {
        return work(options, &cuda, context);
    }
    match driver::fork().context("cannot fork")? {
        None => work_of_child(options, &cuda),
        Some(child) => {
            let worked = work(options, &cuda, context);
            let succeeded = driver::wait_for(child).context("cannot wait for the child")?;
            worked?;
            if succeeded { Ok(()) } else { bail!("the forked child {child} failed") }
        }
    }
}

/// CUDA cannot be used after a fork before it is initialised again.
fn work_of_child(options: &Options, cuda: &Cuda) -> anyhow::Result<()> {
    let code = cuda.count_code()?;
    if code != driver::NOT_INITIALIZED {
        bail!("after a fork cuDeviceGetCount returned {code} instead of CUDA_ERROR_NOT_INITIALIZED");
    }
    cuda.init()?;
    let context = cuda.create_context(options.gpu)?;
    work(options, cuda, context)
}

/// The pace of each thread.
fn pace(options: &Options) -> anyhow::Result<Pace> {
    match (options.every, options.rate) {
        (Some(period), _) if !period.is_zero() => Ok(Pace::Every(period)),
        (None, Some(rate)) if rate > 0.0 && rate.is_finite() => Ok(Pace::Rate(rate / options.threads.max(1) as f64)),
        (None, None) => Ok(Pace::BackToBack),
        _ => bail!("--every and --rate must be above 0"),
    }
}

fn work(options: &Options, cuda: &Cuda, context: Object) -> anyhow::Result<()> {
    let pace = pace(options)?;
    if let Some(start_us) = options.static_start {
        std::thread::sleep(Duration::from_micros(start_us.saturating_sub(gpu::now_ns() / 1_000)));
    }
    let pid = std::process::id();
    let start_time = devkit::process::start_time(pid).context("/proc has no start time of this process; is /proc mounted?")?;
    let calls = WaitLog::open(&options.dir, OF_CALLER, pid, start_time)?;
    let begin = Instant::now();
    let worked = AtomicBool::new(false);
    let each = std::thread::scope(|scope| {
        let writer = scope.spawn(|| write_until(&calls, &worked));
        let threads: Vec<_> = (0..options.threads.max(1))
            .map(|_| scope.spawn(|| Worker::new(options, cuda, &calls, context)?.run(pace, begin)))
            .collect();
        let each: Vec<_> =
            threads.into_iter().map(|thread| thread.join().unwrap_or_else(|_| bail!("a thread panicked"))).collect();
        worked.store(true, Ordering::Relaxed);
        writer.thread().unpark();
        writer.join().unwrap_or_else(|_| bail!("a thread panicked")).map(|()| each)
    })?;
    let mut done = Done::default();
    for one in each {
        let one = one?;
        done.launches += one.launches;
        done.calls += one.calls;
        done.wait_total_seconds += one.wait_total_seconds;
    }
    cuda.destroy_context(context)?;
    let summary = Summary { pid, start_time, mode: options.mode, done };
    println!("{}", serde_json::to_string(&summary)?);
    Ok(())
}

/// Writes the records of all threads until their work has ended, and then once more.
fn write_until(calls: &WaitLog, worked: &AtomicBool) -> anyhow::Result<()> {
    loop {
        let last = worked.load(Ordering::Relaxed);
        calls.write()?;
        if last {
            return Ok(());
        }
        std::thread::park_timeout(WRITE_INTERVAL);
    }
}

/// One thread with its stream.
struct Worker<'a> {
    options: &'a Options,
    cuda: &'a Cuda,
    calls: &'a WaitLog,
    kernel_us: u64,
    stream: Object,
    event: Object,
    graph: Object,
    buffer: Vec<u8>,
}

impl<'a> Worker<'a> {
    fn new(options: &'a Options, cuda: &'a Cuda, calls: &'a WaitLog, context: Object) -> anyhow::Result<Self> {
        let kernel_us = options.kernel.map_or(0, |kernel| kernel.as_micros() as u64);
        cuda.use_context(context)?;
        let (stream, event, graph) = (cuda.create_stream()?, cuda.create_event()?, cuda.create_graph(kernel_us)?);
        Ok(Self { options, cuda, calls, kernel_us, stream, event, graph, buffer: vec![0; 4096] })
    }

    fn run(mut self, pace: Pace, begin: Instant) -> anyhow::Result<Done> {
        let mut timetable = Timetable::new(pace, self.options.phase);
        let mut done = Done::default();
        loop {
            let now = begin.elapsed();
            let due = timetable.next(now);
            if due >= self.options.lasts || now >= self.options.lasts {
                return Ok(done);
            }
            if due > now {
                std::thread::sleep(due - now);
            }
            if self.options.mode != Mode::Empty {
                self.launch()?;
                done.launches += 1;
            }
            let from = Instant::now();
            self.wait()?;
            done.wait_total_seconds += from.elapsed().as_secs_f64();
            done.calls += 1;
        }
    }

    fn launch(&self) -> anyhow::Result<()> {
        match self.options.mode {
            Mode::Graph => self.cuda.launch_graph(self.graph, self.stream),
            _ => self.cuda.launch(self.stream, self.kernel_us),
        }?;
        if self.options.mode == Mode::Event { self.cuda.record(self.event, self.stream) } else { Ok(()) }
    }

    fn wait(&mut self) -> anyhow::Result<()> {
        let blocks = self.options.mode != Mode::Spin;
        if blocks {
            self.calls.enter(self.options.gpu);
        }
        let result = self.call();
        if blocks {
            self.calls.leave(self.options.gpu);
        }
        result
    }

    fn call(&mut self) -> anyhow::Result<()> {
        match self.options.mode {
            Mode::Block | Mode::Graph | Mode::Empty => self.cuda.synchronize_stream(self.stream),
            Mode::Event => self.cuda.synchronize_event(self.event),
            Mode::Ctx => self.cuda.synchronize_context(),
            Mode::Copy => self.cuda.copy_to_host(&mut self.buffer),
            Mode::Spin => {
                while !self.cuda.is_done(self.stream)? {
                    std::hint::spin_loop();
                }
                Ok(())
            }
        }
    }
}
