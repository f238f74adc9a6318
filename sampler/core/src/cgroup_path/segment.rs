//! Classifies one segment of a cgroup path, by its name and its position.
//!
//! A segment is rejected on bytes, by its length, its ends and the end of its parent, before anything is searched or copied: a container
//! chooses the names of its own sub-cgroups and may choose thousands that almost match.

use super::scan::is_top;
use super::{Kind, Runtime};

/// Number of hex digits of an id of docker, containerd, CRI-O or podman.
const ID: usize = 64;
/// Length of BuildKit's ids, in base 36.
const BUILD_ID: usize = 25;
/// Length of `pod` and 32 digits.
const SHORTEST_POD: usize = 35;
/// Limit of containerd.
const MAX_CONTAINERD_ID: usize = 76;

/// A container, or something similar that is not a container. Id and name are as in the path.
#[derive(Clone, Copy)]
pub(super) struct Member<'a> {
    pub kind: Kind,
    pub runtime: Option<Runtime>,
    pub id: Option<&'a str>,
    pub name: Option<&'a str>,
    /// Both are parts of the name of a unit, see [`unescape`].
    pub escaped: bool,
    pub root_len: usize,
}

impl<'a> Member<'a> {
    pub fn of(kind: Kind, runtime: Option<Runtime>, root_len: usize) -> Self {
        Self { kind, runtime, id: None, name: None, escaped: false, root_len }
    }

    fn container(runtime: Option<Runtime>, id: &'a str, root_len: usize) -> Self {
        Self { id: Some(id), ..Self::of(Kind::Container, runtime, root_len) }
    }

    /// A container that its runtime identifies by name.
    fn named(runtime: Runtime, name: &'a str, root_len: usize) -> Self {
        Self { name: Some(name), ..Self::container(Some(runtime), name, root_len) }
    }

    pub fn is_container(&self) -> bool {
        matches!(self.kind, Kind::Container | Kind::Sandbox)
    }

    pub fn text(&self, part: &str) -> String {
        if self.escaped { unescape(part) } else { part.to_owned() }
    }
}

/// The segment `path[start..end]`, without its slashes.
pub(super) struct Segment<'a> {
    path: &'a str,
    start: usize,
    end: usize,
    bytes: &'a [u8],
}

impl<'a> Segment<'a> {
    pub fn leaf(path: &'a str) -> Self {
        Self::new(path, path.rfind('/').map_or(0, |slash| slash + 1), path.len())
    }

    #[inline]
    pub fn new(path: &'a str, start: usize, end: usize) -> Self {
        Self { path, start, end, bytes: path.as_bytes().get(start..end).unwrap_or_default() }
    }

    fn text(&self) -> &'a str {
        self.path.get(self.start..self.end).unwrap_or_default()
    }

    /// The path of the parent, without a trailing slash; empty at the top.
    fn above(&self) -> &'a [u8] {
        self.path.as_bytes().get(..self.start.saturating_sub(1)).unwrap_or_default()
    }

    fn parent(&self) -> Segment<'a> {
        let end = self.start.saturating_sub(1);
        let above = self.path.get(..end).unwrap_or_default();
        Segment::new(self.path, above.rfind('/').map_or(0, |slash| slash + 1), end)
    }

    /// `parent` may be more than one segment.
    #[inline]
    fn is_below(&self, parent: &str) -> bool {
        self.above().strip_suffix(parent.as_bytes()).is_some_and(|rest| rest.ends_with(b"/"))
    }

    fn child(&self) -> Option<Segment<'a>> {
        self.child_at(self.end + 1)
    }

    fn child_at(&self, start: usize) -> Option<Segment<'a>> {
        if matches!(self.path.as_bytes().get(start), None | Some(b'/')) {
            return None;
        }
        let below = self.path.get(start..)?;
        let end = start + below.find('/').unwrap_or(below.len());
        Some(Segment::new(self.path, start, end))
    }

    /// A monitor without an id. It has no sub-cgroups, so only the last segment of a path is checked.
    pub fn monitor(&self) -> Option<Member<'a>> {
        let runtime = if self.bytes == b"conmon" {
            // podman with the cgroupfs manager: one monitor for all containers of a parent.
            self.is_below("libpod_parent").then_some(Runtime::Podman)
        } else if self.bytes.starts_with(b"lxc.monitor.") || (self.is_below("lxc.monitor") && !self.bytes.is_empty()) {
            Some(Runtime::Lxc)
        } else {
            return None;
        };
        Some(Member::of(Kind::Monitor, runtime, self.end))
    }

    /// The container (or sandbox, monitor, build step) with this segment, or its child, as its root.
    #[inline]
    pub fn member(&self) -> Option<Member<'a>> {
        // By length first: then one or two comparisons of whole words are sufficient.
        match self.bytes.len() {
            3 if self.bytes == b"lxc" => self.lxc_parent(),
            5 if self.bytes == b"mesos" => self.mesos(),
            6 if self.bytes == b"garden" => self.garden(),
            6 if self.bytes == b"k8s.io" => self.containerd(),
            7 if self.bytes == b"default" => self.containerd(),
            11 if self.bytes == b"lxc.payload" => self.lxc_parent(),
            13.. if self.bytes.starts_with(b"lxc.payload.") => self.lxc(),
            15.. if self.bytes.starts_with(b"machine-") => self.machine(),
            24.. if self.bytes.starts_with(b"systemd-nspawn@") => self.nspawn(),
            BUILD_ID.. => self.oci(),
            _ => None,
        }
    }

    /// Before LXC 4.0 the name was a separate segment.
    fn lxc_parent(&self) -> Option<Member<'a>> {
        self.child().map(|c| Member::named(Runtime::Lxc, c.text(), c.end))
    }

    fn lxc(&self) -> Option<Member<'a>> {
        self.text().strip_prefix("lxc.payload.").map(|name| Member::named(Runtime::Lxc, name, self.end))
    }

    fn mesos(&self) -> Option<Member<'a>> {
        // Cgroups of Mesos itself.
        let child = self.child().filter(|child| child.bytes != b"agent" && child.bytes != b"slave")?;
        Some(Member::container(Some(Runtime::Mesos), child.text(), child.end))
    }

    fn garden(&self) -> Option<Member<'a>> {
        let below = self.path.as_bytes().get(self.end..).unwrap_or_default();
        // Garden moves containers between these two, depending on whether they use less or more CPU time than their share.
        let between =
            ["/good", "/bad"].iter().find(|name| below.starts_with(name.as_bytes()) && below.get(name.len()) == Some(&b'/'));
        let between = between.map_or(0, |name| name.len());
        let child = self.child_at(self.end + 1 + between).filter(|child| child.bytes != b"good" && child.bytes != b"bad")?;
        Some(Member::container(Some(Runtime::Garden), child.text(), child.end))
    }

    /// `/<namespace>/<id>` of nerdctl and ctr. Any user may choose both, so only well-known namespaces count, and only at the top, where
    /// neither systemd nor users create such a cgroup.
    fn containerd(&self) -> Option<Member<'a>> {
        let child = self.child().filter(|_| is_top(self.above()))?;
        let id = child.text();
        let unit = [".scope", ".slice", ".service"].iter().any(|suffix| id.ends_with(suffix));
        let valid = id.len() <= MAX_CONTAINERD_ID
            && id.starts_with(|c: char| c.is_ascii_alphanumeric())
            && id.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'));
        (valid && !unit).then(|| Member::container(Some(Runtime::Containerd), id, child.end))
    }

    /// Scopes of machined: `machine.slice/machine-NAME.scope`. libvirt registers its machines there too, including virtual machines.
    #[inline]
    fn machine(&self) -> Option<Member<'a>> {
        // Most segments that are not machines have another parent.
        if self.above().ends_with(b".slice") && self.bytes.ends_with(b".scope") { self.machine_in_slice() } else { None }
    }

    #[inline]
    fn machine_in_slice(&self) -> Option<Member<'a>> {
        let name = self.text().strip_prefix("machine-")?.strip_suffix(".scope").filter(|name| !name.is_empty())?;
        // Names of libvirt: driver, number, domain.
        let domain = |driver: &str| {
            let rest = after_dash(name, driver)?;
            let number = rest.bytes().take_while(u8::is_ascii_digit).count();
            after_dash(rest.get(number..)?, "").filter(|domain| number > 0 && !domain.is_empty())
        };
        let virtual_machine = after_dash(name, "qemu").is_some() || domain("ch").is_some();
        if virtual_machine || !(self.is_below("machine.slice") || self.parent().bytes.starts_with(b"machine-")) {
            return None;
        }
        if let Some(uuid) = after_dash(name, "rkt").filter(|uuid| is_uuid(unescape(uuid).as_bytes(), b'-')) {
            return Some(self.rkt(uuid));
        }
        let (runtime, short) = domain("lxc").map_or((Runtime::Nspawn, name), |domain| (Runtime::Lxc, domain));
        Some(Member { name: Some(short), escaped: true, ..Member::container(Some(runtime), name, self.end) })
    }

    /// A rkt pod is a machine that runs systemd; each app is a service in it. An app corresponds to a container of other runtimes, but has
    /// no id of its own.
    fn rkt(&self, uuid: &'a str) -> Member<'a> {
        let services = self.child().filter(|child| child.bytes == b"system.slice");
        let app = services.and_then(|services| services.child()).and_then(|service| {
            let name = service.text().strip_suffix(".service")?;
            // Services of the pod itself.
            let own = name.starts_with("systemd-") || name.contains('@') || name.is_empty();
            (!own).then_some((name, service.end))
        });
        let (name, root_len) = app.map_or((None, self.end), |(name, end)| (Some(name), end));
        Member { name, escaped: true, ..Member::container(Some(Runtime::Rkt), uuid, root_len) }
    }

    fn nspawn(&self) -> Option<Member<'a>> {
        let name = self.text().strip_prefix("systemd-nspawn@")?.strip_suffix(".service").filter(|name| !name.is_empty())?;
        Some(Member { escaped: true, ..Member::named(Runtime::Nspawn, name, self.end) })
    }

    /// Members that are identified by the id at the end of the name.
    #[inline]
    fn oci(&self) -> Option<Member<'a>> {
        let (bare, scope) = self.bytes.strip_suffix(b".scope").map_or((self.bytes, false), |bare| (bare, true));
        match bare.len() {
            ID.. => {
                let (prefix, id) = bare.split_last_chunk::<ID>()?;
                if is_hex(id) { self.with_id(prefix.len(), scope) } else { None }
            }
            BUILD_ID if !scope && self.is_below("buildkit") && is_base36(bare) => self.build(),
            // A build step under systemd; without systemd it is `/docker/buildkit/ID`.
            32 if scope && bare.strip_prefix(b"docker-").is_some_and(is_base36) => {
                Some(Member::of(Kind::Build, Some(Runtime::Docker), self.end))
            }
            28 if !scope && is_garden(bare) => Some(Member::container(Some(Runtime::Garden), self.text(), self.end)),
            34.. if !scope && is_fargate(bare) && self.is_below_task() => {
                Some(Member::container(Some(Runtime::Ecs), self.text(), self.end))
            }
            _ => None,
        }
    }

    fn with_id(&self, prefix_len: usize, scope: bool) -> Option<Member<'a>> {
        let (prefix, rest) = self.text().split_at_checked(prefix_len)?;
        let id = rest.get(..ID)?;
        let container = |runtime| Some(Member::container(runtime, id, self.end));
        match prefix {
            "" if scope => None,
            "" => self.bare_id(id),
            "crio-conmon-" => Some(Member::of(Kind::Monitor, Some(Runtime::CriO), self.end)),
            "libpod-conmon-" => Some(Member::of(Kind::Monitor, Some(Runtime::Podman), self.end)),
            // Under systemd, the sandbox of CRI-O is the cgroup that is not a unit.
            "crio-" if !scope && self.above().ends_with(b".slice") => {
                Some(Member { kind: Kind::Sandbox, ..Member::container(Some(Runtime::CriO), id, self.end) })
            }
            _ => match prefix.strip_suffix('-') {
                Some(runtime) => container(Some(prefix_runtime(runtime)?)),
                // A path intended for systemd, used by a runtime that uses the file system: `X.slice:cri-containerd:ID`.
                None => {
                    let (slice, runtime) = prefix.strip_suffix(':')?.rsplit_once(':')?;
                    let for_systemd = !scope && (slice.is_empty() || slice.ends_with(".slice"));
                    if for_systemd { container(prefix_runtime(runtime)) } else { None }
                }
            },
        }
    }

    /// An id and nothing else: only the parent may determine the runtime, and not always, because docker, for example, accepts any parent.
    fn bare_id(&self, id: &'a str) -> Option<Member<'a>> {
        // A podman pod; its containers have a prefix.
        if self.is_below("libpod_parent") {
            return None;
        }
        if self.is_below("buildkit") {
            return self.build();
        }
        let container = |runtime| Some(Member::container(runtime, id, self.end));
        match self.parent().bytes {
            // The parent itself is the member.
            b"lxc" | b"lxc.payload" | b"mesos" | b"garden" => None,
            // `actions_job`: the `--cgroup-parent` of GitHub's hosted runners.
            b"docker" | b"actions_job" => container(Some(Runtime::Docker)),
            b"default" | b"k8s.io" => container(Some(Runtime::Containerd)),
            // The processes that Kata runs for a sandbox outside its pod.
            b"kata_overhead" => Some(Member { kind: Kind::Sandbox, ..Member::container(None, id, self.end) }),
            _ => container(self.is_ecs().then_some(Runtime::Ecs)),
        }
    }

    /// A build step of docker's BuildKit, or of a separate BuildKit.
    fn build(&self) -> Option<Member<'a>> {
        Some(Member::of(Kind::Build, self.is_below("docker/buildkit").then_some(Runtime::Docker), self.end))
    }

    /// `/ecs/<task>/ID`, or with the name of a cluster before the task.
    fn is_ecs(&self) -> bool {
        let task = self.parent();
        task.is_below("ecs") || (is_task(task.bytes) && task.parent().is_below("ecs"))
    }

    /// The same for `/ecs/<task>` only, in constant time: any number of segments may need this check.
    fn is_below_task(&self) -> bool {
        let above = self.above();
        let task = |length: usize| above.split_at_checked(above.len().checked_sub(length)?);
        [32, 36].into_iter().filter_map(task).any(|(above, task)| above.ends_with(b"/ecs/") && is_task(task))
    }

    /// The pod with this segment as its cgroup: `podU`, `[...-]kubepods[-<qos>]-podU.slice`, or the latter before the colon of a segment
    /// that is a member. U is a UUID or the 32 hex digits of a static pod.
    #[inline]
    pub fn pod_uid(&self, is_member: bool) -> Option<&'a str> {
        if self.bytes.len() < SHORTEST_POD {
            return None;
        }
        if let Some(uid) = self.bytes.strip_prefix(b"pod") {
            return if is_pod_uid(uid) { self.path.get(self.end - uid.len()..self.end) } else { None };
        }
        if self.bytes.ends_with(b".slice") {
            return unit_pod(self.text());
        }
        match self.bytes.split_last_chunk::<ID>()? {
            ([prefix @ .., b':'], _) if is_member => unit_pod(self.text().get(..prefix.len())?.rsplit_once(':')?.0),
            _ => None,
        }
    }
}

fn unit_pod(slice: &str) -> Option<&str> {
    let unit = slice.strip_suffix(".slice")?;
    let uid_of = |length: usize| {
        let (group, uid) = unit.split_at_checked(unit.len().checked_sub(length)?)?;
        let group = group.strip_suffix("-pod")?;
        let group = ["-burstable", "-besteffort"].iter().find_map(|qos| group.strip_suffix(qos)).unwrap_or(group);
        let kubelets = group.strip_suffix("kubepods").is_some_and(|root| root.is_empty() || root.ends_with('-'));
        (kubelets && is_pod_uid(uid.as_bytes())).then_some(uid)
    };
    uid_of(36).or_else(|| uid_of(32))
}

#[inline]
fn prefix_runtime(prefix: &str) -> Option<Runtime> {
    match prefix {
        "docker" => Some(Runtime::Docker),
        "cri-containerd" | "nerdctl" => Some(Runtime::Containerd),
        "crio" => Some(Runtime::CriO),
        "libpod" | "libpod-payload" => Some(Runtime::Podman),
        _ => None,
    }
}

/// The text after a word and a dash, which may be escaped.
#[inline]
fn after_dash<'a>(text: &'a str, word: &str) -> Option<&'a str> {
    let rest = text.strip_prefix(word)?;
    rest.strip_prefix("\\x2d").or_else(|| rest.strip_prefix('-'))
}

// The following functions work on arrays and do not branch on the value of a byte, so that they compile to a few vector instructions.

/// Lower case, as every runtime writes ids.
fn is_hex_digit(byte: u8) -> bool {
    byte.is_ascii_digit() | (b'a'..=b'f').contains(&byte)
}

#[inline]
fn is_hex<const N: usize>(text: &[u8; N]) -> bool {
    text.iter().fold(true, |all, b| all & is_hex_digit(*b))
}

#[inline]
fn is_base36(text: &[u8]) -> bool {
    text.iter().fold(true, |all, b| all & (b.is_ascii_digit() | b.is_ascii_lowercase()))
}

/// `8-4-4-4-` and any number of further digits.
#[inline]
fn is_dashed<const N: usize>(text: &[u8; N], dash: u8) -> bool {
    let mut digits = [b'0'; 48];
    digits[..N].copy_from_slice(text);
    let dashed = [8, 13, 18, 23].into_iter().all(|at| std::mem::replace(&mut digits[at], b'0') == dash);
    dashed && is_hex(&digits)
}

#[inline]
pub(super) fn is_uuid(text: &[u8], dash: u8) -> bool {
    text.as_array::<36>().is_some_and(|text| is_dashed(text, dash))
}

/// Ids of Garden: `8-4-4-4-4`.
#[inline]
fn is_garden(text: &[u8]) -> bool {
    text.as_array::<28>().is_some_and(|text| is_dashed(text, b'-'))
}

#[inline]
fn is_pod_uid(text: &[u8]) -> bool {
    match text.get(8) {
        Some(dash @ (b'-' | b'_')) => is_uuid(text, *dash),
        _ => text.as_array::<32>().is_some_and(is_hex),
    }
}

/// Ids of ECS tasks: 32 hex digits, formerly a UUID.
fn is_task(text: &[u8]) -> bool {
    is_uuid(text, b'-') || text.as_array::<32>().is_some_and(is_hex)
}

/// Ids of Fargate: `<32 hex>-<digits>`.
#[inline]
fn is_fargate(text: &[u8]) -> bool {
    match text.split_first_chunk::<32>() {
        Some((hex, [b'-', digits @ ..])) => !digits.is_empty() && digits.iter().all(u8::is_ascii_digit) && is_hex(hex),
        _ => false,
    }
}

/// Decodes systemd's `\xNN`. A name that does not decode to UTF-8 is returned unchanged.
fn unescape(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    let digit = |b: u8| (b as char).to_digit(16).map(|d| d as u8);
    while let Some((&first, behind)) = rest.split_first() {
        let escaped = match rest {
            [b'\\', b'x', high, low, behind @ ..] => digit(*high).zip(digit(*low)).map(|(high, low)| (high << 4 | low, behind)),
            _ => None,
        };
        let (byte, behind) = escaped.unwrap_or((first, behind));
        bytes.push(byte);
        rest = behind;
    }
    String::from_utf8(bytes).unwrap_or_else(|_| text.to_owned())
}
