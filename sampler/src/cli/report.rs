//! `report`: renders a session file in one of the formats, compares two, or makes one report of several nodes' files.

use std::ffi::OsStr;
use std::io::{IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, bail};
use clap::Args;
use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use sampler_report::{Format, JoinField, Report, TextOptions};
use sampler_session::{Session, View};
use strum::VariantArray as _;

use super::fleet::FleetRequest;
use super::session_files::SessionFiles;
use crate::cli::output::print;
use crate::cli::text::{terminal_safe, terminal_width, use_colours};
use crate::objects::is_url;

const EXAMPLES: &str = "\
Examples:
  gpu-sampler report session.gpus
  gpu-sampler report session.gpus -o report.html
  gpu-sampler report session.gpus --from 10s --to 1m30s --namespace ml
  gpu-sampler report session.gpus --format csv | python3 -c 'import pandas, sys; print(pandas.read_csv(sys.stdin))'
  gpu-sampler report before.gpus after.gpus
  gpu-sampler report --fleet node-a.gpus node-b.gpus
  gpu-sampler report --fleet s3://bucket/gpu-sessions --from 2026-05-04T10:00:00Z --to 2026-05-04T11:00:00Z";

#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct ReportArgs {
    /// Session file, or the URL of one in an object store (s3://, gs://, az://, file:///); with a second one, compare the two
    #[arg(value_name = "FILE", num_args = 1.., required = true)]
    files: Vec<PathBuf>,
    /// Make one report of the session files of several nodes; FILE may also be a folder or a URL prefix, for all below it
    #[arg(long)]
    fleet: bool,
    /// Fields that containers of different nodes have in common to be one user of --fleet; repeatable or comma-separated
    /// [default: namespace,container,image]
    #[arg(long, value_name = "FIELD", value_delimiter = ',', value_parser = join_field_parser(), requires = "fleet")]
    join_by: Vec<JoinField>,
    /// Output format [default: by the extension of -o, else text]
    #[arg(long, value_parser = format_parser())]
    format: Option<Format>,
    /// File to write; an existing file is replaced atomically [default: standard output]
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Start of the reported range: an offset from the session's start (10s, 1m30s) or a time (RFC 3339)
    #[arg(long, value_name = "WHEN", value_parser = moment)]
    from: Option<Moment>,
    /// End of the reported range, as --from
    #[arg(long, value_name = "WHEN", value_parser = moment)]
    to: Option<Moment>,
    /// Report only this GPU, by UUID, its prefix, or index; may be repeated
    #[arg(long, value_name = "GPU")]
    gpu: Vec<String>,
    /// Report only this container, by id, its prefix, name or pod; may be repeated
    #[arg(long, value_name = "CONTAINER")]
    container: Vec<String>,
    /// Report only containers of this namespace; may be repeated
    #[arg(long, value_name = "NAMESPACE")]
    namespace: Vec<String>,
    /// Report all users, ignoring the --gpu, --container and --namespace of the recording
    #[arg(long, conflicts_with_all = ["gpu", "container", "namespace"])]
    all: bool,
}

/// A parser of `--format` with help for each format.
fn format_parser() -> impl TypedValueParser<Value = Format> {
    let values = Format::VARIANTS.iter().map(|format| PossibleValue::new(format.name()).help(format.description()));
    PossibleValuesParser::new(values).try_map(|name| name.parse::<Format>())
}

fn join_field_parser() -> impl TypedValueParser<Value = JoinField> {
    PossibleValuesParser::new(JoinField::VARIANTS.iter().map(|field| field.name())).try_map(|name| name.parse::<JoinField>())
}

fn from_extension(path: &Path) -> Option<Format> {
    let extension = path.extension().and_then(OsStr::to_str)?.to_ascii_lowercase();
    match extension.as_str() {
        "htm" => Some(Format::Html),
        name => name.parse().ok(),
    }
}

/// A time as given on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    AfterStart(Duration),
    At(SystemTime),
}

fn moment(text: &str) -> Result<Moment, String> {
    if let Ok(offset) = humantime::parse_duration(text) {
        return Ok(Moment::AfterStart(offset));
    }
    let time = humantime::parse_rfc3339(text).map(Moment::At);
    time.map_err(|_| "expected an offset from the start, such as 10s or 1m30s, or a time such as 2026-05-04T10:00:31Z".to_owned())
}

/// Nanoseconds since the session's start; 0 for times before it.
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
        let format = self.format.or_else(|| self.output.as_deref().and_then(from_extension)).unwrap_or(Format::Text);
        if let Some(problem) = self.usage_error(format) {
            eprintln!("error: {problem}\n\nFor more information, try 'gpu-sampler report --help'.");
            return Ok(ExitCode::from(2));
        }
        for file in &self.files {
            self.check_not_output(file)?;
        }
        if self.fleet {
            return self.run_fleet(format);
        }
        let progress = ReportProgress::start();
        let session_files = SessionFiles::new()?;
        let mut reports = Vec::new();
        for file in &self.files {
            progress.show(format!("reading {}", file.display()));
            reports.push(self.read(&session_files, file)?);
        }
        progress.show("writing the report".to_owned());
        let page = match reports.as_slice() {
            [a, b] => {
                let comparison = sampler_report::compare(a, b);
                if format == Format::Json { comparison.json() } else { comparison.text(&self.options()) }
            }
            [report] => format.render(report, &self.options()),
            _ => bail!("expected one or two session files"),
        };
        self.deliver(&page, progress)?;
        for (file, report) in self.files.iter().zip(&reports) {
            warn(file, report);
        }
        Ok(ExitCode::SUCCESS)
    }

    fn run_fleet(&self, format: Format) -> anyhow::Result<ExitCode> {
        let progress = ReportProgress::start();
        let (view, show) = (|session: &Session| self.view(session), |stage| progress.show(stage));
        let (from, to) = (self.from, self.to);
        let request = FleetRequest { files: &self.files, from, to, join_by: &self.join_by, view: &view, progress: &show };
        let fleet = request.fleet()?;
        let page = match format {
            Format::Json => fleet.json(),
            Format::Csv => fleet.csv(),
            _ => fleet.text(&self.options()),
        };
        self.deliver(&page, progress)?;
        for problem in &fleet.problems {
            eprintln!("gpu-sampler: {} is not reported: {}", terminal_safe(&problem.file), terminal_safe(&problem.problem));
        }
        Ok(if fleet.problems.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }

    /// Writes or prints the page, and ends the progress line.
    fn deliver(&self, page: &str, progress: ReportProgress) -> anyhow::Result<()> {
        let written = self.output.as_deref().map(|path| write(path, page));
        drop(progress);
        match written {
            Some(done) => done,
            None => print(page),
        }
    }

    /// The reason why the arguments cannot be combined.
    fn usage_error(&self, format: Format) -> Option<String> {
        let name = format.name();
        if self.fleet && !matches!(format, Format::Text | Format::Json | Format::Csv) {
            return Some(format!("a report of a fleet is available as text, json or csv, not as {name}"));
        }
        if !self.fleet && self.files.len() > 2 {
            return Some("more than two files need --fleet, which makes one report of them".to_owned());
        }
        if !self.fleet && self.files.len() == 2 && !matches!(format, Format::Text | Format::Json) {
            return Some(format!("a comparison of two sessions is available as text or json, not as {name}"));
        }
        let to_terminal = self.output.is_none() && std::io::stdout().is_terminal();
        (to_terminal && matches!(format, Format::Html | Format::Perfetto))
            .then(|| format!("{name} cannot be shown on a terminal; use -o FILE or a pipe"))
    }

    /// The report must not overwrite the session.
    fn check_not_output(&self, file: &Path) -> anyhow::Result<()> {
        if is_url(file) {
            return Ok(());
        }
        let canonical = |path: &Path| path.canonicalize().ok();
        match self.output.as_deref().and_then(canonical) {
            Some(output) if canonical(file) == Some(output.clone()) => {
                bail!("-o {} is the session file itself; give another file", output.display())
            }
            _ => Ok(()),
        }
    }

    fn read(&self, session_files: &SessionFiles, file: &Path) -> anyhow::Result<Report> {
        let session = session_files.read_one(file)?;
        let view = self.view(&session);
        if view.to_ns.is_some_and(|to| view.from_ns.unwrap_or(0) >= to) {
            bail!("--from is not before --to, so there is nothing to report of {}", file.display());
        }
        let report = sampler_report::build(&session, &view);
        let filters = [("--gpu", &self.gpu), ("--container", &self.container), ("--namespace", &self.namespace)];
        let filters: Vec<String> =
            filters.iter().flat_map(|(flag, values)| values.iter().map(move |value| format!("{flag} {value}"))).collect();
        if !filters.is_empty() && (report.gpus.is_empty() || report.users.is_empty() && self.gpu.is_empty()) {
            bail!("nothing in {} matches {}", file.display(), filters.join(" "));
        }
        Ok(report)
    }

    /// The view of the flags, or else the one that the session was recorded with.
    fn view(&self, session: &Session) -> View {
        let flags = View {
            gpus: self.gpu.clone(),
            containers: self.container.clone(),
            namespaces: self.namespace.clone(),
            ..View::default()
        };
        let is_filtered = !(flags.gpus.is_empty() && flags.containers.is_empty() && flags.namespaces.is_empty());
        let view = if self.all || is_filtered { flags } else { session.header.view.clone() };
        let ns = |moment: Option<Moment>| moment.map(|moment| offset(moment, session));
        View { from_ns: ns(self.from).or(view.from_ns), to_ns: ns(self.to).or(view.to_ns), ..view }
    }

    fn options(&self) -> TextOptions {
        let to_terminal = self.output.is_none() && std::io::stdout().is_terminal();
        TextOptions {
            width: terminal_width().filter(|_| to_terminal),
            colour: use_colours(to_terminal),
            unicode: locale_is_utf8(),
        }
    }
}

/// Whether the terminal can show Unicode. True without a locale: a container has none, while the terminal outside shows Unicode.
fn locale_is_utf8() -> bool {
    let set = ["LC_ALL", "LC_CTYPE", "LANG"].iter().filter_map(std::env::var_os).find(|value| !value.is_empty());
    set.is_none_or(|locale| {
        let locale = locale.to_string_lossy().to_ascii_lowercase();
        locale.contains("utf-8") || locale.contains("utf8")
    })
}

/// Writes atomically: to a temporary file in the same folder, which is then renamed. A path that is not a regular file, such as
/// /dev/stdout, is written to directly.
fn write(path: &Path, page: &str) -> anyhow::Result<()> {
    let cannot = || format!("cannot write {}", path.display());
    if path.metadata().is_ok_and(|meta| !meta.is_file()) {
        return std::fs::write(path, page).with_context(cannot);
    }
    // Of a symbolic link the target is replaced, not the link.
    let target = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let mut name = target.file_name().with_context(|| format!("{} has no file name", path.display()))?.to_owned();
    name.push(format!(".{}.part", std::process::id()));
    let part = target.with_file_name(name);
    let written = std::fs::File::create(&part)
        .and_then(|mut file| file.write_all(page.as_bytes()).and_then(|()| file.sync_all()))
        .and_then(|()| std::fs::rename(&part, &target));
    if written.is_err() {
        // It may not exist.
        let _ = std::fs::remove_file(&part);
    }
    written.with_context(cannot)
}

/// Repeats on stderr what the report states about damage, for readers of only its numbers.
fn warn(file: &Path, report: &Report) {
    if report.truncated && report.damage.is_empty() {
        eprintln!(
            "gpu-sampler: {} is incomplete: the file ends before the session did; the report covers what was recorded until then",
            file.display()
        );
    }
    for damage in &report.damage {
        eprintln!("gpu-sampler: {} is damaged: {}", file.display(), terminal_safe(damage));
    }
}

/// A progress line on stderr after 500 ms; none if stderr is not a terminal.
struct ReportProgress {
    stages: Option<Sender<String>>,
    thread: Option<JoinHandle<()>>,
}

impl ReportProgress {
    fn start() -> ReportProgress {
        if !std::io::stderr().is_terminal() {
            return ReportProgress { stages: None, thread: None };
        }
        let (stages, stage_changes) = channel::<String>();
        let show = move || {
            let (begin, mut stage, mut shown) = (Instant::now(), String::new(), false);
            loop {
                match stage_changes.recv_timeout(Duration::from_millis(500)) {
                    Ok(next) => stage = next,
                    Err(RecvTimeoutError::Timeout) => {
                        shown = true;
                        eprint!("\r\x1b[K{} ({} s)", terminal_safe(&stage), begin.elapsed().as_secs());
                    }
                    Err(RecvTimeoutError::Disconnected) => break,
                }
            }
            if shown {
                eprint!("\r\x1b[K");
            }
        };
        // Without a thread there is no progress line; the report is not affected.
        let thread = std::thread::Builder::new().name("progress".to_owned()).spawn(show).ok();
        ReportProgress { stages: Some(stages), thread }
    }

    fn show(&self, stage: String) {
        if let Some(stages) = &self.stages {
            // There is no receiver if the thread could not be started.
            let _ = stages.send(stage);
        }
    }
}

impl Drop for ReportProgress {
    fn drop(&mut self) {
        self.stages = None;
        if let Some(thread) = self.thread.take() {
            // A panic of the thread affects the progress line only.
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
    struct ReportCommand {
        #[command(flatten)]
        args: ReportArgs,
    }

    fn parsed(line: &str) -> ReportArgs {
        ReportCommand::try_parse_from(["report"].into_iter().chain(line.split_whitespace())).unwrap().args
    }

    fn session() -> Session {
        let mut session = Session::default();
        session.header.start_wall = WallTime(1_777_888_800_000_000_000);
        session.header.view = View { namespaces: vec!["ml".to_owned()], ..View::default() };
        session
    }

    #[test]
    fn moments_are_offsets_or_times() {
        let cases = [
            ("10s", Some(10)),
            ("1m30s", Some(90)),
            ("0s", Some(0)),
            ("2026-05-04T10:00:31Z", Some(31)),
            ("2026-05-04T09:00:00Z", Some(0)),
            ("10", None),
            ("soon", None),
        ];
        for (text, expect) in cases {
            let found = moment(text).ok().map(|moment| offset(moment, &session()) / 1_000_000_000);
            assert_eq!(found, expect, "{text}");
        }
    }

    #[test]
    fn the_view_is_that_of_the_flags_or_the_recorded_one() {
        let cases = [("f", vec![], vec!["ml"]), ("f --gpu 0 --gpu 1", vec!["0", "1"], vec![]), ("f --all", vec![], vec![])];
        for (line, gpus, namespaces) in cases {
            let view = parsed(line).view(&session());
            assert_eq!(
                (view.gpus, view.namespaces),
                (gpus.iter().map(|&gpu| gpu.into()).collect(), namespaces.iter().map(|&name| name.into()).collect()),
                "{line}"
            );
        }
        assert_eq!(parsed("f --from 1s --to 2s").view(&session()).to_ns, Some(2_000_000_000));
    }

    #[test]
    fn arguments_that_cannot_be_combined_are_rejected() {
        let cases = [
            ("a b", Format::Html, true),
            ("a b", Format::Json, false),
            ("a -o x", Format::Html, false),
            ("a b c", Format::Text, true),
            ("--fleet a b c", Format::Text, false),
            ("--fleet a b", Format::Csv, false),
            ("--fleet a b", Format::Html, true),
        ];
        for (line, format, expect) in cases {
            assert_eq!(parsed(line).usage_error(format).is_some(), expect, "{line} {format:?}");
        }
        assert!(ReportCommand::try_parse_from(["report", "a", "--join-by", "pod"]).is_err());
        assert_eq!(parsed("--fleet a --join-by pod,image").join_by, [JoinField::Pod, JoinField::Image]);
        assert!(ReportCommand::try_parse_from(["report"]).is_err());
    }

    #[test]
    fn the_extension_selects_the_format() {
        let cases =
            [("a.html", Some(Format::Html)), ("a.b.CSV", Some(Format::Csv)), ("a.json", Some(Format::Json)), ("html", None)];
        for (name, expect) in cases {
            assert_eq!(from_extension(Path::new(name)), expect);
        }
    }

    #[test]
    fn files_are_replaced_atomically_and_links_stay() {
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
