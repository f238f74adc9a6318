//! Settings that are read again on SIGHUP: those of the server take effect, a change of any other is logged and waits for a restart.

use std::path::PathBuf;
use std::sync::Arc;

use tokio::signal::unix::{SignalKind, signal};

use crate::config::{Config, ConfigError, Settings};
use crate::error::display_chain;
use crate::export::state::AppState;
use crate::service_notify::ServiceNotifier;

/// The keys that take effect without a restart. The content of the files with credentials does as well.
const RELOADED: [&str; 5] = ["allowed_host", "collect", "open_metrics", "pod_labels", "reservation_namespace"];

/// Where the settings come from.
#[derive(Clone, Debug)]
pub struct SettingsSource {
    /// Flags and environment.
    pub settings: Settings,
    pub file: Option<PathBuf>,
}

/// The result of reading the settings again.
#[derive(Debug, Default, PartialEq, Eq)]
struct Changes {
    applied: Vec<String>,
    /// They need a restart.
    ignored: Vec<String>,
}

impl SettingsSource {
    /// Flags and environment over the file.
    fn merged(&self) -> Result<Settings, ConfigError> {
        let file = self.file.as_deref().map(Settings::from_file).transpose()?;
        Ok(self.settings.clone().over(file.unwrap_or_default()))
    }

    pub fn config(&self) -> Result<Config, ConfigError> {
        self.merged()?.validate(None)
    }
}

/// `present` with those settings of `new` that take effect without a restart.
fn reloaded(present: &Settings, new: Settings) -> (Settings, Changes) {
    let keys = |settings: &Settings| match toml::Table::try_from(settings) {
        Ok(table) => table,
        Err(error) => unreachable!("settings are a table of plain values: {error}"),
    };
    let (before, after) = (keys(present), keys(&new));
    let names = before.keys().chain(after.keys().filter(|key| !before.contains_key(*key)));
    let (applied, ignored) =
        names.filter(|key| before.get(*key) != after.get(*key)).cloned().partition(|key| RELOADED.contains(&key.as_str()));
    let settings = Settings {
        allowed_host: new.allowed_host,
        collect: new.collect,
        open_metrics: new.open_metrics,
        pod_labels: new.pod_labels,
        reservation_namespace: new.reservation_namespace,
        ..present.clone()
    };
    (settings, Changes { applied, ignored })
}

/// The files with credentials count in any case, as they do when a request comes.
fn reload(source: &SettingsSource, state: &AppState, before: &Settings) -> Result<(Settings, Changes), ConfigError> {
    state.security.check();
    apply(source, state, before)
}

fn apply(source: &SettingsSource, state: &AppState, before: &Settings) -> Result<(Settings, Changes), ConfigError> {
    let (settings, changes) = reloaded(before, source.merged()?);
    let config = settings.clone().validate(None)?;
    if config.needs_credentials() && !state.security.rules().have_credentials() {
        return Err(ConfigError::NoCredentials(config.listen));
    }
    state.config.store(Arc::new(config));
    Ok((settings, changes))
}

/// Reads the settings and the files with credentials again on every SIGHUP.
pub async fn on_hangup(source: SettingsSource, state: Arc<AppState>, notifier: Option<ServiceNotifier>) {
    let mut hangups = match signal(SignalKind::hangup()) {
        Ok(hangups) => hangups,
        Err(error) => return tracing::warn!(%error, "cannot handle SIGHUP: settings are not read again"),
    };
    let mut present = match source.merged() {
        Ok(present) => present,
        Err(error) => return tracing::warn!(error = display_chain(&error), "cannot read the settings again"),
    };
    while hangups.recv().await.is_some() {
        let (source, this, before, notifier) = (source.clone(), Arc::clone(&state), present.clone(), notifier.clone());
        // Files may be slow.
        let reloading = tokio::task::spawn_blocking(move || match notifier {
            Some(notifier) => notifier.reloading(|| reload(&source, &this, &before)),
            None => reload(&source, &this, &before),
        });
        match reloading.await {
            Ok(Ok((settings, Changes { applied, ignored }))) => {
                present = settings;
                tracing::info!(changed = applied.join(", "), "SIGHUP: the settings were read again");
                if !ignored.is_empty() {
                    tracing::warn!(settings = ignored.join(", "), "changes of these settings take effect after a restart");
                }
            }
            Ok(Err(error)) => tracing::error!(error = display_chain(&error), "SIGHUP: the previous settings stay in force"),
            Err(error) => tracing::error!(%error, "SIGHUP: the settings were not read again"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_of_the_server_are_applied_and_others_wait_for_a_restart() {
        let settings = |text: &str| toml::from_str::<Settings>(text).unwrap();
        let present = settings("listen = '127.0.0.1:1'\nallowed_host = ['a']\npod_labels = 'old'");
        let new = settings(
            "listen = '127.0.0.1:2'\nallowed_host = ['b']\npod_labels = 'old'\ngpu_budget_percent = 3.0\nopen_metrics = true",
        );
        let (settings, changes) = reloaded(&present, new);
        let names = |keys: &[&str]| keys.iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(
            changes,
            Changes { applied: names(&["allowed_host", "open_metrics"]), ignored: names(&["listen", "gpu_budget_percent"]) }
        );
        assert_eq!(settings.allowed_host, Some(vec!["b".into()]));
        assert_eq!((settings.listen.as_deref(), settings.gpu_budget_percent), (Some("127.0.0.1:1"), None));
    }

    #[test]
    fn every_reloaded_key_is_a_setting() {
        let text: String = RELOADED.iter().map(|key| format!("{key} = 0\n")).collect();
        let error = toml::from_str::<Settings>(&text).unwrap_err().to_string();
        assert!(!error.contains("unknown field"), "{error}");
    }
}
