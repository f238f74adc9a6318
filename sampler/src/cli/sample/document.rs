//! The output of `explain --sample`: as JSON by serialization, and as text. Unknown values are null.

use sampler_report::UserName;
use serde::Serialize;

use crate::cli::text::{bytes, wrapped};

#[derive(Serialize)]
pub struct ExplainedSample {
    pub gpu: SampledGpu,
    /// The requested time. Times are RFC 3339.
    pub asked: String,
    /// The end of the sample's span.
    pub time: String,
    pub after_start_seconds: f64,
    /// The length of the span.
    pub covers_seconds: f64,
    #[serde(flatten)]
    pub sample: SampleState,
    /// The users that the span is credited to, the largest part first.
    pub credited: Vec<CreditedUser>,
    /// The processes with a context on the device; null if unknown at that time.
    pub held: Option<Holders>,
    /// Parts of the session file that cannot be read.
    pub damage: Vec<String>,
}

#[derive(Serialize)]
pub struct SampledGpu {
    pub uuid: String,
    pub index: u32,
    pub model: String,
}

/// What the driver reported for the span. Absent fields do not apply to the state.
#[derive(Default, Serialize)]
pub struct SampleState {
    pub state: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub busy_percent: Option<f64>,
    /// The driver's time of the sample.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub driver_stamp_ns: Option<u64>,
    /// The processes of the sample.
    #[serde(rename = "rows", skip_serializing_if = "Option::is_none")]
    pub processes: Option<Vec<SampledProcess>>,
    pub went_to: &'static str,
}

#[derive(Serialize)]
pub struct SampledProcess {
    pub pid: u32,
    pub percent: u8,
    pub user: SampledUser,
    /// Start of the process's membership in the user.
    pub there_since: Option<String>,
}

#[derive(Serialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum SampledUser {
    Container {
        /// The cgroup path.
        id: Option<String>,
        container_id: Option<String>,
        namespace: Option<String>,
        pod: Option<String>,
        container: Option<String>,
        name: Option<String>,
    },
    /// The own cgroup of a pod.
    Pod {
        id: String,
        namespace: Option<String>,
        pod: Option<String>,
    },
    Job(NamedCgroup),
    Unit(NamedCgroup),
    Login(NamedCgroup),
    /// A process of none of these.
    Host {
        comm: Option<String>,
    },
    Unknown {
        reason: &'static str,
        because: &'static str,
    },
}

#[derive(Serialize)]
pub struct NamedCgroup {
    /// The short name, as in metrics.
    pub user: String,
    /// The cgroup path.
    pub id: String,
}

#[derive(Serialize)]
pub struct CreditedUser {
    pub user: SampledUser,
    pub seconds: f64,
}

#[derive(Serialize)]
pub struct Holders {
    pub time: String,
    pub processes: Vec<HolderProcess>,
}

#[derive(Serialize)]
pub struct HolderProcess {
    pub pid: u32,
    /// The driver's list that contains the process.
    pub list: &'static str,
    pub memory_bytes: Option<u64>,
    pub user: SampledUser,
}

impl SampledUser {
    fn text(&self) -> String {
        match self {
            Self::Container { id, container_id, namespace, pod, container, name } => {
                let [id, container_id, namespace, pod, container, name] =
                    [id, container_id, namespace, pod, container, name].map(|text| text.as_deref().unwrap_or_default());
                format!("container {}   {id}", UserName { namespace, pod, container, name, container_id, id: "" })
            }
            Self::Pod { id, namespace, pod } => {
                let [namespace, pod] = [namespace, pod].map(|text| text.as_deref().unwrap_or_default());
                format!("pod {}   {id}", UserName { namespace, pod, id: "", ..UserName::default() })
            }
            Self::Job(NamedCgroup { user, id }) => format!("job {user}   {id}"),
            Self::Unit(NamedCgroup { user, id }) => format!("unit {user}   {id}"),
            Self::Login(NamedCgroup { user, id }) => format!("login {user}   {id}"),
            Self::Host { comm } => format!("host process   {}", comm.as_deref().unwrap_or_default()),
            Self::Unknown { reason, because } => format!("unattributed: {because} ({reason})"),
        }
    }
}

fn line(name: &str, value: &str) -> String {
    wrapped(&format!("{name:<14}"), 14, value)
}

impl ExplainedSample {
    pub fn text(&self) -> String {
        let SampledGpu { uuid, index, model } = &self.gpu;
        let mut out = line("gpu", &format!("{index}   {uuid}   {model}"));
        let milliseconds = self.covers_seconds * 1e3;
        let (time, offset) = (&self.time, self.after_start_seconds);
        out += &line("time", &format!("{time} ({offset:.3} s after the start), end of a span of {milliseconds:.1} ms"));
        let busy = self.sample.busy_percent.map_or(String::new(), |busy| format!(", {busy:.0} % busy"));
        let stamp = self.sample.driver_stamp_ns.map_or(String::new(), |ns| format!(", stamped {ns} ns by the driver"));
        out += &line("state", &format!("{}{busy}{stamp}", self.sample.state));
        out += &line("attributed to", self.sample.went_to);
        for process in self.sample.processes.iter().flatten() {
            let SampledProcess { pid, percent, user, there_since } = process;
            let since = there_since.as_ref().map_or("start unknown".to_owned(), |since| format!("member since {since}"));
            out += &line("process", &format!("pid {pid}, {percent} %: {}   {since}", user.text()));
        }
        for credit in &self.credited {
            out += &line("credited", &format!("{:.1} ms: {}", credit.seconds * 1e3, credit.user.text()));
        }
        out += &self.holders_text();
        for damage in &self.damage {
            out += &line("damage", damage);
        }
        out
    }

    fn holders_text(&self) -> String {
        let Some(Holders { time, processes }) = &self.held else { return line("held by", "unknown at that time") };
        if processes.is_empty() {
            return line("held by", &format!("no process, as of {time}"));
        }
        let mut out = line("held by", &format!("as of {time}"));
        for HolderProcess { pid, list, memory_bytes, user } in processes {
            let memory = memory_bytes.map_or("memory unknown".to_owned(), bytes);
            out += &line("", &format!("pid {pid}, {list}, {memory}: {}", user.text()));
        }
        out
    }
}
