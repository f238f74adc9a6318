//! Names and shares of users, as `top` shows them.

use sampler_report::short_id;

use crate::cli::text::{DASH, terminal_safe, user_name};
use crate::export::live::{LiveOther, LiveUser};

pub fn name(user: &LiveUser) -> String {
    // Not shortened: the name of a job, unit or login session, and the UID of a pod.
    if !user.is_container() && user.pod.is_none() {
        return terminal_safe(&user.container_id);
    }
    user_name([&user.namespace, &user.pod, &user.container, &user.name], &user.container_id, &user.id)
}

pub fn contender_name(other: &LiveOther) -> String {
    match other.kind.as_str() {
        "host" => return "the host".into(),
        "unknown" => return "unknown".into(),
        "_other" => return "others".into(),
        _ => {}
    }
    let container_id = other.container_id.as_deref().unwrap_or_default();
    user_name([&other.namespace, &other.pod, &other.container, &other.name], container_id, "?")
}

/// Identifies a contender.
pub fn contender_key(other: &LiveOther) -> &str {
    other.container_id.as_deref().unwrap_or(&other.kind)
}

pub fn short(id: &str) -> String {
    terminal_safe(short_id(id))
}

/// Percent with its standard error.
pub fn share(user: &LiveUser) -> String {
    match (user.duty_cycle_percent, user.duty_cycle_stderr) {
        (Some(share), Some(error)) => format!("{share:.1} ±{error:.1}"),
        (Some(share), None) => format!("{share:.1}"),
        (None, _) => DASH.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_tenants_are_safe_to_display() {
        let user = LiveUser { name: Some("web\x1b[2J".to_owned()), ..LiveUser::default() };
        assert_eq!(name(&user), "web\\u{1b}[2J");
        let job = LiveUser { kind: "job".to_owned(), container_id: "slurm/12345678901".to_owned(), ..LiveUser::default() };
        assert_eq!(name(&job), "slurm/12345678901", "not shortened as ids are");
    }
}
