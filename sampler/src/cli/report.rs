//! `report`: what a session file says, in one of the formats; two files are compared.

use std::ffi::OsStr;
use std::io::{IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use crate::cli::output::print;
use anyhow::{Context as _, bail};
use clap::{Args, ValueEnum};
use sampler_report::{Report, TextOptions};
use sampler_session::{Session, View};

const EXAMPLES: &str = "\
Examples:
  gpu-sampler report session.gpus
  gpu-sampler report session.gpus -o report.html
  gpu-sampler report session.gpus --from 10s --to 1m30s --namespace ml
  gpu-sampler report session.gpus --format csv | python3 -c 'import pandas, sys; print(pandas.read_csv(sys.stdin))'
  gpu-sampler report before.gpus after.gpus";

#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct ReportArgs {
    /// A recorded session; with a second one, the two are compared
    #[arg(value_name = "FILE", num_args = 1..=2, required = true)]
    files: Vec<PathBuf>,
    /// What to write [default: what the name of -o ends in, else text]
    #[arg(long, value_enum)]
    format: Option<Format>,
    /// Where to write it: a new file takes the old one's place once it is whole [default: standard output]
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Leave out what was before: so long after the start (10s, 1m30s), or a time (RFC 3339)
    #[arg(long, value_name = "WHEN", value_parser = moment)]
    from: Option<Moment>,
    /// Leave out what was after
    #[arg(long, value_name = "WHEN", value_parser = moment)]
    to: Option<Moment>,
    /// These GPUs alone: UUID, its beginning, or index; may be repeated
    #[arg(long, value_name = "GPU")]
    gpu: Vec<String>,
    /// These containers alone: id, its beginning, name, or pod; may be repeated
    #[arg(long, value_name = "CONTAINER")]
    container: Vec<String>,
    /// Containers of these namespaces alone; may be repeated
    #[arg(long, value_name = "NAMESPACE")]
    namespace: Vec<String>,
    /// Show everything, also what was left out by the flags it was recorded with
    #[arg(long, conflicts_with_all = ["gpu", "container", "namespace"])]
    all: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    /// For a terminal
    Text,
    /// For programs
    Json,
    /// One page that needs nothing else
    Html,
    /// A trace for ui.perfetto.dev
    Perfetto,
    /// One row for each window, GPU and user
    Csv,
}

impl Format {
    fn of_name(path: &Path) -> Option<Format> {
        let end = path.extension().and_then(OsStr::to_str)?.to_ascii_lowercase();
        Some(match end.as_str() {
            "json" => Format::Json,
            "html" | "htm" => Format::Html,
            "csv" => Format::Csv,
            "perfetto" => Format::Perfetto,
            _ => return None,
        })
    }
}

/// As it was given on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Moment {
    AfterStart(Duration),
    At(SystemTime),
}

fn moment(text: &str) -> Result<Moment, String> {
    if let Ok(offset) = humantime::parse_duration(text) {
        return Ok(Moment::AfterStart(offset));
    }
    let time = humantime::parse_rfc3339(text).map(Moment::At);
    time.map_err(|_| "neither a time since the start, such as 10s or 1m30s, nor one such as 2026-05-04T10:00:31Z".to_owned())
}

/// Nanoseconds since the session's start; none before it.
fn offset(moment: Moment, session: &Session) -> u64 {
    let nanos = |length: Duration| u64::try_from(length.as_nanos()).unwrap_or(u64::MAX);
    match moment {
        Moment::AfterStart(offset) => nanos(offset),
        Moment::At(time) => {
            let since_epoch = time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, nanos);
            since_epoch.saturating_sub(session.header.start_wall.0)
        }
    }
}

impl ReportArgs {
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let format = self.format.or_else(|| self.output.as_deref().and_then(Format::of_name)).unwrap_or(Format::Text);
        if let Some(words) = self.misuse(format) {
            eprintln!("error: {words}\n\nFor more information, try 'gpu-sampler report --help'.");
            return Ok(ExitCode::from(2));
        }
        for file in &self.files {
            self.keep(file)?;
        }
        let progress = ReportProgress::start();
        let mut reports = Vec::new();
        for file in &self.files {
            progress.tell(format!("reading {}", file.display()));
            reports.push(self.read(file)?);
        }
        progress.tell("writing the report".to_owned());
        let page = match reports.as_slice() {
            [a, b] => {
                let comparison = sampler_report::compare(a, b);
                if format == Format::Json { comparison.json() } else { comparison.text(&self.options()) }
            }
            [one] => match format {
                Format::Text => sampler_report::text(one, &self.options()),
                Format::Json => sampler_report::json(one),
                Format::Html => sampler_report::html(one),
                Format::Perfetto => sampler_report::perfetto(one),
                Format::Csv => sampler_report::csv(one),
            },
            _ => bail!("one file or two are read"),
        };
        let written = self.output.as_deref().map(|path| write(path, &page));
        drop(progress);
        match written {
            Some(done) => done?,
            None => print(&page)?,
        }
        for (file, report) in self.files.iter().zip(&reports) {
            warn(file, report);
        }
        Ok(ExitCode::SUCCESS)
    }

    /// What is asked for and does not go together, in words.
    fn misuse(&self, format: Format) -> Option<String> {
        let name = format.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default();
        if self.files.len() == 2 && !matches!(format, Format::Text | Format::Json) {
            return Some(format!("two sessions are compared as text or json; there is no {name} of two"));
        }
        let to_terminal = self.output.is_none() && std::io::stdout().is_terminal();
        (to_terminal && matches!(format, Format::Html | Format::Perfetto))
            .then(|| format!("{name} is not for a terminal; use -o FILE, or a pipe"))
    }

    /// A report in the place of its own session would be the end of it.
    fn keep(&self, file: &Path) -> anyhow::Result<()> {
        let whole = |path: &Path| path.canonicalize().ok();
        match self.output.as_deref().and_then(whole) {
            Some(output) if whole(file) == Some(output.clone()) => bail!("-o {} is the session itself", output.display()),
            _ => Ok(()),
        }
    }

    fn read(&self, file: &Path) -> anyhow::Result<Report> {
        let session = crate::session::read(file)?;
        let view = self.view(&session);
        if view.to_ns.is_some_and(|to| view.from_ns.unwrap_or(0) >= to) {
            bail!("nothing of {} is between --from and --to", file.display());
        }
        let report = sampler_report::build(&session, &view);
        let asked = [("--gpu", &self.gpu), ("--container", &self.container), ("--namespace", &self.namespace)];
        let asked: Vec<String> =
            asked.iter().flat_map(|(flag, all)| all.iter().map(move |one| format!("{flag} {one}"))).collect();
        if !asked.is_empty() && (report.gpus.is_empty() || report.users.is_empty() && self.gpu.is_empty()) {
            bail!("nothing in {} is meant by {}", file.display(), asked.join(" "));
        }
        Ok(report)
    }

    /// What was asked for now, or else when it was recorded.
    fn view(&self, session: &Session) -> View {
        let now = View {
            gpus: self.gpu.clone(),
            containers: self.container.clone(),
            namespaces: self.namespace.clone(),
            ..View::default()
        };
        let narrowed = !(now.gpus.is_empty() && now.containers.is_empty() && now.namespaces.is_empty());
        let view = if self.all || narrowed { now } else { session.header.view.clone() };
        let ns = |moment: Option<Moment>| moment.map(|moment| offset(moment, session));
        View { from_ns: ns(self.from).or(view.from_ns), to_ns: ns(self.to).or(view.to_ns), ..view }
    }

    fn options(&self) -> TextOptions {
        let terminal = self.output.is_none() && std::io::stdout().is_terminal();
        let set = |name: &str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
        let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        let width = terminal_size::terminal_size_of(std::io::stdout()).map(|(width, _)| usize::from(width.0));
        TextOptions {
            width: width.filter(|_| terminal),
            colour: terminal && !set("NO_COLOR") && !dumb,
            unicode: blocks_are_shown(),
        }
    }
}

/// Unless the locale says otherwise: in a container none is set, and the terminal outside shows them.
fn blocks_are_shown() -> bool {
    let set = ["LC_ALL", "LC_CTYPE", "LANG"].iter().filter_map(std::env::var_os).find(|value| !value.is_empty());
    set.is_none_or(|locale| {
        let locale = locale.to_string_lossy().to_ascii_lowercase();
        locale.contains("utf-8") || locale.contains("utf8")
    })
}

/// Whole or not at all: into a file beside it, which then takes its place. What is no file, as /dev/stdout, is written to.
fn write(path: &Path, page: &str) -> anyhow::Result<()> {
    let cannot = || format!("cannot write {}", path.display());
    if path.metadata().is_ok_and(|meta| !meta.is_file()) {
        return std::fs::write(path, page).with_context(cannot);
    }
    // Where it is a link, the file that it leads to is replaced, not the link.
    let target = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let mut name = target.file_name().with_context(|| format!("{} names no file", path.display()))?.to_owned();
    name.push(format!(".{}.part", std::process::id()));
    let part = target.with_file_name(name);
    let written = std::fs::File::create(&part)
        .and_then(|mut file| file.write_all(page.as_bytes()).and_then(|()| file.sync_all()))
        .and_then(|()| std::fs::rename(&part, &target));
    if written.is_err() {
        // It may never have been there.
        let _ = std::fs::remove_file(&part);
    }
    written.with_context(cannot)
}

/// The report says so itself, but whoever reads only its numbers should know, too.
fn warn(file: &Path, report: &Report) {
    if report.truncated && report.damage.is_empty() {
        eprintln!("gpu-sampler: {} ends before its session did; the report is of what was recorded until then", file.display());
    }
    for words in &report.damage {
        let shown: String =
            words.chars().flat_map(|c| if c.is_control() { c.escape_default().collect() } else { vec![c] }).collect();
        eprintln!("gpu-sampler: {} is damaged: {shown}", file.display());
    }
}

/// A line on stderr while it takes longer than a moment; none where nobody watches.
struct ReportProgress {
    stages: Option<Sender<String>>,
    thread: Option<JoinHandle<()>>,
}

impl ReportProgress {
    fn start() -> ReportProgress {
        if !std::io::stderr().is_terminal() {
            return ReportProgress { stages: None, thread: None };
        }
        let (stages, told) = channel::<String>();
        let show = move || {
            let (begin, mut stage, mut shown) = (Instant::now(), String::new(), false);
            loop {
                match told.recv_timeout(Duration::from_millis(500)) {
                    Ok(next) => stage = next,
                    Err(RecvTimeoutError::Timeout) => {
                        shown = true;
                        eprint!("\r\x1b[K{} ({} s)", stage.escape_default(), begin.elapsed().as_secs());
                    }
                    Err(RecvTimeoutError::Disconnected) => break,
                }
            }
            if shown {
                eprint!("\r\x1b[K");
            }
        };
        // Without a thread there is no line, and all the rest.
        let thread = std::thread::Builder::new().name("progress".to_owned()).spawn(show).ok();
        ReportProgress { stages: Some(stages), thread }
    }

    fn tell(&self, stage: String) {
        if let Some(stages) = &self.stages {
            // Nobody listens where the thread could not be had.
            let _ = stages.send(stage);
        }
    }
}

impl Drop for ReportProgress {
    fn drop(&mut self) {
        self.stages = None;
        if let Some(thread) = self.thread.take() {
            // It only prints.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;
    use sampler_core::units::WallTime;

    use super::*;

    #[derive(clap::Parser)]
    struct Alone {
        #[command(flatten)]
        args: ReportArgs,
    }

    fn parsed(line: &str) -> ReportArgs {
        Alone::try_parse_from(["report"].into_iter().chain(line.split_whitespace())).unwrap().args
    }

    fn session() -> Session {
        let mut session = Session::default();
        session.header.start_wall = WallTime(1_777_888_800_000_000_000);
        session.header.view = View { namespaces: vec!["ml".to_owned()], ..View::default() };
        session
    }

    #[test]
    fn moments_are_offsets_or_times() {
        let rows = [
            ("10s", Some(10)),
            ("1m30s", Some(90)),
            ("0s", Some(0)),
            ("2026-05-04T10:00:31Z", Some(31)),
            ("2026-05-04T09:00:00Z", Some(0)),
            ("10", None),
            ("soon", None),
        ];
        for (text, expect) in rows {
            let found = moment(text).ok().map(|moment| offset(moment, &session()) / 1_000_000_000);
            assert_eq!(found, expect, "{text}");
        }
    }

    #[test]
    fn views_are_those_asked_for_or_recorded() {
        let rows = [("f", vec![], vec!["ml"]), ("f --gpu 0 --gpu 1", vec!["0", "1"], vec![]), ("f --all", vec![], vec![])];
        for (line, gpus, namespaces) in rows {
            let view = parsed(line).view(&session());
            assert_eq!(
                (view.gpus, view.namespaces),
                (gpus.iter().map(|&one| one.into()).collect(), namespaces.iter().map(|&one| one.into()).collect()),
                "{line}"
            );
        }
        assert_eq!(parsed("f --from 1s --to 2s").view(&session()).to_ns, Some(2_000_000_000));
    }

    #[test]
    fn what_does_not_go_together_is_told() {
        let rows = [("a b", Format::Html, true), ("a b", Format::Json, false), ("a -o x", Format::Html, false)];
        for (line, format, expect) in rows {
            assert_eq!(parsed(line).misuse(format).is_some(), expect, "{line} {format:?}");
        }
        assert!(Alone::try_parse_from(["report", "a", "b", "c"]).is_err());
        assert!(Alone::try_parse_from(["report"]).is_err());
    }

    #[test]
    fn names_tell_formats() {
        let rows =
            [("a.html", Some(Format::Html)), ("a.b.CSV", Some(Format::Csv)), ("a.json", Some(Format::Json)), ("html", None)];
        for (name, expect) in rows {
            assert_eq!(Format::of_name(Path::new(name)), expect);
        }
    }

    #[test]
    fn files_are_replaced_whole() {
        let dir = tempfile::tempdir().unwrap();
        let (file, link) = (dir.path().join("report.txt"), dir.path().join("link"));
        std::fs::write(&file, "old").unwrap();
        std::os::unix::fs::symlink(&file, &link).unwrap();
        write(&link, "new").unwrap();
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "new");
        assert!(link.is_symlink());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
        let nowhere = dir.path().join("no/such/dir");
        assert!(write(&nowhere, "x").unwrap_err().to_string().contains("no/such/dir"));
    }

    #[test]
    fn a_session_is_not_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a.gpus");
        std::fs::write(&file, "facts").unwrap();
        let line = format!("{0} -o {0}", file.display());
        assert!(parsed(&line).run().is_err());
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "facts");
    }
}
