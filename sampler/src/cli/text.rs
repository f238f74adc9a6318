//! Numbers and names as `top` writes them. What is not known is a dash, never 0.

use unicode_width::{UnicodeWidthChar as _, UnicodeWidthStr as _};

use crate::cli::output::harmless;
use crate::export::live::{LiveOther, LiveUser};

pub const DASH: &str = "–";
/// Of an id, as `docker ps` prints it.
const SHORT_ID: usize = 12;

pub fn short(id: &str) -> String {
    harmless(id).chars().take(SHORT_ID).collect()
}

fn path(namespace: Option<&str>, pod: Option<&str>, container: Option<&str>) -> Option<String> {
    let parts: Vec<&str> = [namespace, pod, container].into_iter().flatten().collect();
    (namespace.is_some() || pod.is_some()).then(|| harmless(&parts.join("/")))
}

/// As people call it: namespace, pod and container; else its name; else the beginning of its id.
pub fn name(user: &LiveUser) -> String {
    path(user.namespace.as_deref(), user.pod.as_deref(), user.container.as_deref())
        .or_else(|| user.name.as_deref().map(harmless))
        .unwrap_or_else(|| if user.container_id.is_empty() { harmless(&user.id) } else { short(&user.container_id) })
}

pub fn name_of_other(other: &LiveOther) -> String {
    match other.kind.as_str() {
        "host" => "the host".into(),
        "unknown" => "unknown".into(),
        "_other" => "others".into(),
        _ => path(other.namespace.as_deref(), other.pod.as_deref(), other.container.as_deref())
            .or_else(|| other.name.as_deref().map(harmless))
            .unwrap_or_else(|| short(other.container_id.as_deref().unwrap_or("?"))),
    }
}

/// What tells one contender from another.
pub fn key_of_other(other: &LiveOther) -> &str {
    other.container_id.as_deref().unwrap_or(&other.kind)
}

pub fn bytes(value: Option<u64>) -> String {
    let Some(value) = value else { return DASH.into() };
    let mut value = value as f64;
    let mut unit = "B";
    for larger in ["KiB", "MiB", "GiB", "TiB"] {
        if value < 1024.0 {
            break;
        }
        (value, unit) = (value / 1024.0, larger);
    }
    let digits = usize::from(unit != "B" && value < 100.0);
    format!("{value:.digits$} {unit}")
}

pub fn percent(ratio: Option<f64>) -> String {
    ratio.map_or(DASH.into(), |ratio| format!("{:.0} %", ratio * 100.0))
}

/// Percent with its standard error.
pub fn share(user: &LiveUser) -> String {
    match (user.duty_cycle_percent, user.duty_cycle_stderr) {
        (Some(share), Some(error)) => format!("{share:.1} ±{error:.1}"),
        (Some(share), None) => format!("{share:.1}"),
        (None, _) => DASH.into(),
    }
}

/// At most `width` columns; a cut is told by its last one.
pub fn fit(text: &str, width: usize) -> String {
    if text.width() <= width {
        return text.to_owned();
    }
    let (mut out, mut taken) = (String::new(), 0);
    for c in text.chars() {
        let columns = c.width().unwrap_or_default();
        if taken + columns + 1 > width {
            break;
        }
        out.push(c);
        taken += columns;
    }
    if width > 0 {
        out.push('…');
    }
    out
}

/// Exactly `width` columns.
pub fn left(text: &str, width: usize) -> String {
    let text = fit(text, width);
    let pad = width.saturating_sub(text.width());
    format!("{text}{:pad$}", "")
}

pub fn right(text: &str, width: usize) -> String {
    let text = fit(text, width);
    let pad = width.saturating_sub(text.width());
    format!("{:pad$}{text}", "")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers() {
        for (value, expect) in
            [(None, "–"), (Some(0), "0 B"), (Some(1536), "1.5 KiB"), (Some(16 << 30), "16.0 GiB"), (Some(600 << 20), "600 MiB")]
        {
            assert_eq!(bytes(value), expect);
        }
        assert_eq!((percent(None), percent(Some(0.994))), ("–".into(), "99 %".into()));
    }

    #[test]
    fn columns() {
        for (text, width, expect) in [("abc", 5, "abc  "), ("abcdef", 4, "abc…"), ("データ", 4, "デ… "), ("x", 0, "")] {
            assert_eq!(left(text, width), expect);
        }
        assert_eq!(right("7", 3), "  7");
    }

    #[test]
    fn names() {
        let text = |s: &str| Some(s.to_owned());
        let docker = LiveUser { name: text("web\x1b[2J"), container_id: "a".repeat(64), ..LiveUser::default() };
        assert_eq!(name(&docker), "web\\u{1b}[2J");
        assert_eq!(name(&LiveUser { name: None, ..docker.clone() }), "a".repeat(12));
        let pod = LiveUser { namespace: text("prod"), pod: text("p"), container: text("c"), ..docker };
        assert_eq!(name(&pod), "prod/p/c");
    }
}
