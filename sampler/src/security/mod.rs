//! Who may use the HTTP server: TLS, client certificates, users and tokens, from files that are read again when they change.
//!
//! ```text
//!  request, or a new connection --at most once a second--> stat of every file --changed--> read all of that kind
//!     token file:         valid -> its tokens count.    invalid or empty -> no token counts: removing tokens revokes them
//!     web configuration:  valid -> it counts; idle connections end, others after their response
//!                         invalid -> the previous one stays: a file that is half written must not end the service
//! ```
//! Both invalid states are conditions of the agent's health. SIGHUP reads the files without waiting for a request.

pub mod credentials;
pub mod error;
mod file_states;
pub mod rate_limit;
pub mod tls;
pub mod web_config;

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use axum::http::{HeaderMap, header};
use sampler_core::units::WallTime;
use thiserror::Error;
use tokio::sync::watch;

use self::credentials::{PasswordCheck, Tokens, decode_basic};
use self::error::SecurityError;
use self::file_states::FileStates;
use self::tls::Tls;
use self::web_config::WebRules;
use crate::error::display_chain;
use crate::health::Health;
use crate::health::condition::Condition;

const CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// A file system may hang; the rules in memory stay in force then.
const CHECK_TIMEOUT: Duration = Duration::from_secs(1);

/// The configured files.
#[derive(Clone, Debug, Default)]
pub struct SecurityFiles {
    pub token_file: Option<PathBuf>,
    pub web_config_file: Option<PathBuf>,
}

/// The rules in force.
#[derive(Debug, Default)]
pub struct Rules {
    tokens: Arc<Tokens>,
    /// Why no token counts, although there is a token file.
    token_problem: Option<String>,
    pub web: Arc<WebRules>,
    /// Raised with each new web configuration.
    pub generation: u64,
}

/// How a request proved that it is allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Credential {
    Token,
    Password,
    Certificate,
}

impl Credential {
    /// Browsers send it without being asked, also for pages of other servers.
    pub fn is_ambient(self) -> bool {
        self != Credential::Token
    }
}

/// Why a request is not authorized.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum Unauthorized {
    #[error("unauthorized: {0}")]
    NoCredentials(String),
    #[error("unauthorized: the bearer token is not in the token file")]
    WrongToken,
    #[error("unauthorized: no bearer token is valid at present: {0}")]
    NoTokens(String),
    #[error("unauthorized: wrong user name or password")]
    WrongPassword,
    #[error("too many wrong passwords: try again in a second")]
    TooManyPasswords,
}

impl Rules {
    pub fn load(files: &SecurityFiles) -> Result<Self, SecurityError> {
        Self::watched(files).map(|(rules, _)| rules)
    }

    /// The rules, and the states of their files from before the reading.
    fn watched(files: &SecurityFiles) -> Result<(Self, Watched), SecurityError> {
        let mut watched = Watched { token: FileStates::of(files.token_file.as_deref()), web: FileStates::default() };
        let tokens = files.token_file.as_deref().map(Tokens::load).transpose()?.unwrap_or_default();
        let web = files.web_config_file.as_deref().map(|path| WebRules::load(path, &mut watched.web)).transpose()?;
        let rules = Self { tokens: Arc::new(tokens), web: Arc::new(web.unwrap_or_default()), ..Self::default() };
        Ok((rules, watched))
    }

    pub fn tls(&self) -> Option<&Tls> {
        self.web.tls.as_ref()
    }

    fn has_tokens(&self) -> bool {
        !self.tokens.is_empty() || self.token_problem.is_some()
    }

    /// Whether any client can be authorized.
    pub fn have_credentials(&self) -> bool {
        self.has_tokens() || self.web.has_credentials()
    }

    /// Checks the credentials of a request. A certificate does not suffice with users, nor with tokens if every client has to show one.
    pub async fn authorize(&self, headers: &HeaderMap, has_certificate: bool, peer: IpAddr) -> Result<Credential, Unauthorized> {
        let users = &self.web.users;
        let needs_login = self.has_tokens() || !users.is_empty();
        // As in exporter-toolkit, users are asked for their password with a certificate as well.
        let certificate_suffices = users.is_empty() && !(needs_login && self.tls().is_some_and(|tls| tls.requires_certificate));
        if has_certificate && certificate_suffices {
            return Ok(Credential::Certificate);
        }
        let sent =
            headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok()).and_then(|value| value.split_once(' '));
        match sent {
            Some((scheme, token)) if scheme.eq_ignore_ascii_case("bearer") && self.has_tokens() => match &self.token_problem {
                Some(problem) => Err(Unauthorized::NoTokens(problem.clone())),
                None if self.tokens.accepts(token.trim()) => Ok(Credential::Token),
                None => Err(Unauthorized::WrongToken),
            },
            Some((scheme, encoded)) if scheme.eq_ignore_ascii_case("basic") && !users.is_empty() => {
                let Some((user, password)) = decode_basic(encoded) else { return Err(Unauthorized::WrongPassword) };
                match users.check(&user, &password, peer).await {
                    PasswordCheck::Accepted => Ok(Credential::Password),
                    PasswordCheck::Wrong => Err(Unauthorized::WrongPassword),
                    PasswordCheck::NotChecked => Err(Unauthorized::TooManyPasswords),
                }
            }
            _ => Err(Unauthorized::NoCredentials(self.expected())),
        }
    }

    /// What a request has to send.
    fn expected(&self) -> String {
        let token = self.has_tokens().then_some("`Authorization: Bearer TOKEN` with a token of the token file");
        let user = (!self.web.users.is_empty()).then_some("user and password (basic authentication)");
        let certificate = self.tls().is_some_and(|tls| tls.verifies_clients).then_some("a client certificate");
        let all: Vec<&str> = [token, user, certificate].into_iter().flatten().collect();
        if all.is_empty() {
            return "no credential is configured: set --token-file, or --web.config.file with users or client certificates"
                .to_owned();
        }
        format!("send {}", all.join(", or "))
    }

    /// Values of `WWW-Authenticate`; a browser asks for user and password if there are users.
    pub fn challenges(&self) -> impl Iterator<Item = &'static str> {
        let basic = (!self.web.users.is_empty()).then_some("Basic realm=\"gpu-sampler\", charset=\"UTF-8\"");
        let bearer = self.has_tokens().then_some("Bearer realm=\"gpu-sampler\"");
        [basic, bearer].into_iter().flatten()
    }
}

impl WebRules {
    pub fn has_credentials(&self) -> bool {
        !self.users.is_empty() || self.tls.as_ref().is_some_and(|tls| tls.verifies_clients)
    }

    /// The first protection of these rules that others do not have.
    fn lost_in(&self, new: &WebRules) -> Option<&'static str> {
        let verifies = |rules: &WebRules| rules.tls.as_ref().is_some_and(|tls| tls.verifies_clients);
        let requires = |rules: &WebRules| rules.tls.as_ref().is_some_and(|tls| tls.requires_certificate);
        [
            ("TLS", self.tls.is_some() && new.tls.is_none()),
            ("users", !self.users.is_empty() && new.users.is_empty()),
            ("client certificates", verifies(self) && !verifies(new)),
            ("required client certificates", requires(self) && !requires(new)),
        ]
        .into_iter()
        .find_map(|(name, is_lost)| is_lost.then_some(name))
    }

    /// For the log.
    fn summary(&self) -> String {
        let tls = match &self.tls {
            None => "no TLS",
            Some(tls) if tls.requires_certificate => "TLS with client certificates",
            Some(tls) if tls.verifies_clients => "TLS, client certificates accepted",
            Some(_) => "TLS",
        };
        format!("{tls}, {} users", self.users.len())
    }
}

/// What the last check saw.
#[derive(Debug, Default)]
struct Watched {
    token: FileStates,
    web: FileStates,
}

/// The rules, kept up to date with the files.
pub struct Security {
    files: SecurityFiles,
    rules: ArcSwap<Rules>,
    generation: watch::Sender<u64>,
    watched: Mutex<Watched>,
    is_checking: AtomicBool,
    /// Milliseconds since `started`.
    checked: AtomicU64,
    started: Instant,
    health: Arc<Health>,
    now: fn() -> WallTime,
}

/// Permits the next check, also after a panic.
struct EndOfCheck<'a> {
    security: &'a Security,
    at: u64,
}

impl Drop for EndOfCheck<'_> {
    fn drop(&mut self) {
        self.security.checked.store(self.at, Ordering::Relaxed);
        self.security.is_checking.store(false, Ordering::Release);
    }
}

impl Security {
    pub fn new(files: SecurityFiles, health: Arc<Health>, now: fn() -> WallTime) -> Result<Arc<Self>, SecurityError> {
        let (rules, watched) = Rules::watched(&files)?;
        let security = Self {
            rules: ArcSwap::from_pointee(rules),
            generation: watch::Sender::new(0),
            watched: Mutex::new(watched),
            is_checking: AtomicBool::new(false),
            checked: AtomicU64::new(0),
            started: Instant::now(),
            health,
            now,
            files,
        };
        security.check_expiry();
        Ok(Arc::new(security))
    }

    pub fn rules(&self) -> Arc<Rules> {
        self.rules.load_full()
    }

    /// Changes with each new web configuration.
    pub fn generations(&self) -> watch::Receiver<u64> {
        self.generation.subscribe()
    }

    /// The rules in force, after the files were checked within the last second.
    pub async fn current(self: &Arc<Self>) -> Arc<Rules> {
        let now = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        let is_due = now.saturating_sub(self.checked.load(Ordering::Relaxed)) >= CHECK_INTERVAL.as_millis() as u64;
        let has_files = self.files.token_file.is_some() || self.files.web_config_file.is_some();
        if has_files && is_due && !self.is_checking.swap(true, Ordering::AcqRel) {
            let this = Arc::clone(self);
            let check = tokio::task::spawn_blocking(move || {
                let _checking = EndOfCheck { security: &this, at: now };
                this.check();
            });
            // Beyond its limit it goes on in its thread, and the next requests use the rules in memory.
            let _ = tokio::time::timeout(CHECK_TIMEOUT, check).await;
        }
        self.rules()
    }

    /// Reads files that have changed. Blocks on the file system.
    pub fn check(&self) {
        let mut watched = self.watched.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(path) = &self.files.token_file {
            let states = watched.token.again();
            if states != watched.token {
                watched.token = states;
                self.reload_tokens(path);
            }
        }
        if let Some(path) = &self.files.web_config_file {
            if watched.web.again() != watched.web {
                watched.web = self.reload_web(path);
            }
            self.check_expiry();
        }
    }

    fn reload_tokens(&self, path: &Path) {
        let (before, loaded) = (self.rules(), Tokens::load(path));
        let (tokens, token_problem) = match loaded {
            Ok(tokens) => {
                if tokens != *before.tokens {
                    tracing::info!(tokens = tokens.len(), "the token file has changed: its tokens are valid now");
                }
                self.health.recovered(Condition::TokenFile);
                (tokens, None)
            }
            Err(error) => {
                let problem = display_chain(&error);
                self.health.degraded(Condition::TokenFile, &format!("no bearer token is valid: {problem}"));
                (Tokens::default(), Some(problem))
            }
        };
        let (tokens, web) = (Arc::new(tokens), Arc::clone(&before.web));
        self.rules.store(Arc::new(Rules { tokens, token_problem, web, generation: before.generation }));
    }

    /// The files that were read, with their states from before the reading.
    fn reload_web(&self, path: &Path) -> FileStates {
        let (before, mut states) = (self.rules(), FileStates::default());
        let loaded = WebRules::load(path, &mut states);
        let problem = match &loaded {
            // A file that is half written may be valid, with less in it.
            Ok(web) => before.web.lost_in(web).map(|lost| {
                format!("the web configuration {} has no {lost} any more, which only a restart accepts", path.display())
            }),
            Err(error) => Some(display_chain(error)),
        };
        match (loaded, problem) {
            (Ok(web), None) => {
                self.health.recovered(Condition::WebConfig);
                tracing::info!(configuration = web.summary(), "the web configuration has changed");
                web.users.adopt(&before.web.users);
                let generation = before.generation + 1;
                let (tokens, token_problem) = (Arc::clone(&before.tokens), before.token_problem.clone());
                self.rules.store(Arc::new(Rules { tokens, token_problem, web: Arc::new(web), generation }));
                self.generation.send_replace(generation);
            }
            (_, problem) => {
                let problem = problem.unwrap_or_default();
                self.health.degraded(Condition::WebConfig, &format!("the previous web configuration stays in force: {problem}"));
            }
        }
        states
    }

    fn check_expiry(&self) {
        let rules = self.rules();
        match rules.tls().filter(|tls| tls.expires <= (self.now)()) {
            Some(_) => {
                self.health.degraded(Condition::WebCertificate, "the certificate of the HTTP server has expired; replace it")
            }
            None => self.health.recovered(Condition::WebCertificate),
        }
    }
}

#[cfg(test)]
mod tests;
