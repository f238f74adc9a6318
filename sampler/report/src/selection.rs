//! Selects the GPUs and users that a report shows.

use std::collections::BTreeSet;

use sampler_core::fact::User;
use sampler_session::View;

use super::model::{Usage, UserReport};

pub fn selects_gpu(view: &View, uuid: &str, index: u32) -> bool {
    view.gpus.is_empty() || view.gpus.iter().any(|wanted| uuid.starts_with(wanted.as_str()) || wanted.parse() == Ok(index))
}

fn selects(view: &View, user: &UserReport) -> bool {
    let matches = |wanted: &String| {
        let names = [&user.pod, &user.container, &user.name, &user.id, &user.user];
        let id = user.container_id.as_deref().unwrap_or_default();
        names.into_iter().any(|text| text == wanted) || (wanted.len() >= 4 && id.starts_with(wanted.as_str()))
    };
    (view.containers.is_empty() || view.containers.iter().any(matches))
        && (view.namespaces.is_empty() || view.namespaces.contains(&user.namespace))
}

/// Keeps the selected users and their contenders.
pub fn narrow(view: &View, users: &mut Vec<(User, UserReport)>) {
    if view.containers.is_empty() && view.namespaces.is_empty() {
        return;
    }
    let selected: BTreeSet<String> =
        users.iter().filter(|(_, user)| selects(view, user)).map(|(_, user)| user.id.clone()).collect();
    let contends = |usage: &Usage| usage.contenders.iter().any(|contender| selected.contains(&contender.id));
    users.retain(|(_, user)| selected.contains(&user.id) || user.gpus.iter().any(contends));
    for (_, user) in users.iter_mut().filter(|(_, user)| !selected.contains(&user.id)) {
        user.gpus.retain(contends);
        for usage in &mut user.gpus {
            usage.contenders.retain(|contender| selected.contains(&contender.id));
        }
    }
}
