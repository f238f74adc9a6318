//! Bearer tokens of a file, and users of the web configuration with their bcrypt hashes.
//!
//! Tokens are compared by digest, in a time that depends neither on which one matches nor on how much of it. A bcrypt hash takes tens of
//! milliseconds of processor time by design: a password that was accepted is remembered by digest, and other checks run one at a time, at
//! a limited rate, so that wrong passwords cost the node little.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use sha2::{Digest as _, Sha256};
use subtle::{Choice, ConstantTimeEq as _};
use tokio::sync::Semaphore;

use super::error::{SecurityError, read_file};
use super::rate_limit::PeerLimits;

/// Checks of passwords that were not accepted before, of a peer: 1 a second, 5 at once.
const CHECKS_OF_PEER: (Duration, u32) = (Duration::from_secs(1), 5);
/// Of all peers: 4 a second, 20 at once.
const CHECKS: (Duration, u32) = (Duration::from_millis(250), 20);
/// A higher one takes seconds for each password.
const COSTS: std::ops::RangeInclusive<u32> = 4..=14;
/// For the check of another password to end.
const CHECK_PATIENCE: Duration = Duration::from_secs(3);
/// Longer tokens are refused when the file is read.
const MAX_TOKEN_BYTES: usize = 4096;
/// bcrypt reads no more of a password.
const MAX_PASSWORD_BYTES: usize = 72;

type Sha256Digest = [u8; 32];

fn digest(parts: &[&[u8]]) -> Sha256Digest {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hash.finalize().into()
}

/// The bearer tokens of a file.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Tokens(Vec<Sha256Digest>);

impl Tokens {
    /// One token a line; blank lines and lines that begin with `#` are skipped.
    pub fn load(path: &Path) -> Result<Self, SecurityError> {
        let tokens = read_tokens(path)?;
        Ok(Self(tokens.iter().map(|token| digest(&[token.as_bytes()])).collect()))
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn accepts(&self, token: &str) -> bool {
        let sent = digest(&[token.as_bytes()]);
        let found = self.0.iter().fold(Choice::from(0), |found, token| found | token.ct_eq(&sent));
        found.into()
    }
}

/// The tokens as text, at least one.
pub fn read_tokens(path: &Path) -> Result<Vec<String>, SecurityError> {
    let text = read_file("the token file", path)?;
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    let tokens: Vec<String> = lines.map(str::to_owned).collect();
    let problem = if tokens.is_empty() {
        Some("the file contains no token; write one per line to it".to_owned())
    } else {
        // Others cannot be sent in a header.
        let is_token =
            |token: &String| token.len() <= MAX_TOKEN_BYTES && token.bytes().all(|b| b == b' ' || b.is_ascii_graphic());
        let invalid = tokens.iter().position(|token| !is_token(token));
        invalid.map(|n| format!("token {} has a character outside ASCII, or more than {MAX_TOKEN_BYTES} characters", n + 1))
    };
    match problem {
        Some(problem) => Err(SecurityError::Tokens { path: path.to_owned(), problem }),
        None => Ok(tokens),
    }
}

/// The result of a check of a user's password.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PasswordCheck {
    Accepted,
    Wrong,
    /// Too many wrong passwords: this one was not checked.
    NotChecked,
}

/// Users with bcrypt hashes.
#[derive(Debug)]
pub struct Users {
    hashes: BTreeMap<String, String>,
    /// Compared with the passwords of unknown users, so that the time of a response does not show which users exist.
    decoy: String,
    /// Digests of accepted passwords, with their users and hashes.
    accepted: Mutex<HashMap<String, Sha256Digest>>,
    checks: PeerLimits,
    /// Held during a check.
    checking: Arc<Semaphore>,
}

impl Default for Users {
    fn default() -> Self {
        Self {
            hashes: BTreeMap::new(),
            decoy: String::new(),
            accepted: Mutex::default(),
            checks: PeerLimits::new(CHECKS_OF_PEER, CHECKS),
            checking: Arc::new(Semaphore::new(1)),
        }
    }
}

impl Users {
    /// `Err` names the user with an invalid hash.
    pub fn new(hashes: BTreeMap<String, String>) -> Result<Self, String> {
        let is_invalid = |hash: &str| !hash.parse::<bcrypt::HashParts>().is_ok_and(|parts| COSTS.contains(&parts.get_cost()));
        if let Some((user, _)) = hashes.iter().find(|(user, hash)| is_invalid(hash) || user.contains(':')) {
            return Err(user.clone());
        }
        let decoy = hashes.values().next().cloned().unwrap_or_default();
        Ok(Self { hashes, decoy, ..Self::default() })
    }

    /// Takes over the passwords that were accepted; with another hash they do not match.
    pub fn adopt(&self, earlier: &Users) {
        let known = earlier.accepted.lock().unwrap_or_else(PoisonError::into_inner).clone();
        *self.accepted.lock().unwrap_or_else(PoisonError::into_inner) = known;
    }

    pub fn is_empty(&self) -> bool {
        self.hashes.is_empty()
    }

    pub fn len(&self) -> usize {
        self.hashes.len()
    }

    /// The password check of one user of these rules, which may take tens of milliseconds.
    pub async fn check(&self, user: &str, password: &str, peer: IpAddr) -> PasswordCheck {
        let hash = self.hashes.get(user);
        let key = digest(&[user.as_bytes(), hash.map_or(&[][..], |hash| hash.as_bytes()), password.as_bytes()]);
        if self.was_accepted(user, &key) {
            return PasswordCheck::Accepted;
        }
        if password.len() > MAX_PASSWORD_BYTES {
            return PasswordCheck::Wrong;
        }
        if !self.checks.admits(peer, Instant::now()) {
            return PasswordCheck::NotChecked;
        }
        let turn = tokio::time::timeout(CHECK_PATIENCE, Arc::clone(&self.checking).acquire_owned()).await;
        let Ok(Ok(turn)) = turn else { return PasswordCheck::NotChecked };
        let (is_known, hash, password) = (hash.is_some(), hash.unwrap_or(&self.decoy).clone(), password.to_owned());
        let verified = tokio::task::spawn_blocking(move || {
            // Until the check ends, also if the client does not wait for it.
            let _turn = turn;
            bcrypt::verify(password, &hash)
        })
        .await;
        if is_known && matches!(verified, Ok(Ok(true))) {
            self.accepted.lock().unwrap_or_else(PoisonError::into_inner).insert(user.to_owned(), key);
            return PasswordCheck::Accepted;
        }
        PasswordCheck::Wrong
    }

    fn was_accepted(&self, user: &str, key: &Sha256Digest) -> bool {
        let accepted = self.accepted.lock().unwrap_or_else(PoisonError::into_inner);
        accepted.get(user).is_some_and(|known| known.ct_eq(key).into())
    }
}

/// User and password of an `Authorization: Basic` header, without the scheme.
pub fn decode_basic(encoded: &str) -> Option<(String, String)> {
    let text = String::from_utf8(STANDARD.decode(encoded.trim()).ok()?).ok()?;
    let (user, password) = text.split_once(':')?;
    Some((user.to_owned(), password.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn users() -> Users {
        let hash = bcrypt::hash("secret", 4).unwrap();
        Users::new(BTreeMap::from([("prometheus".to_owned(), hash)])).unwrap()
    }

    #[tokio::test]
    async fn only_the_password_of_the_user_is_accepted_and_wrong_ones_are_limited() {
        let users = users();
        for (user, password, expect) in [
            ("prometheus", "secret", PasswordCheck::Accepted),
            ("prometheus", "Secret", PasswordCheck::Wrong),
            ("prometheus", "", PasswordCheck::Wrong),
            ("other", "secret", PasswordCheck::Wrong),
            ("", "", PasswordCheck::Wrong),
            ("prometheus", "another", PasswordCheck::NotChecked),
            // It was accepted before.
            ("prometheus", "secret", PasswordCheck::Accepted),
        ] {
            assert_eq!(users.check(user, password, [10, 0, 0, 1].into()).await, expect, "{user} {password}");
        }
    }

    #[test]
    fn a_hash_that_is_not_bcrypt_is_refused_with_its_user() {
        let refused = Users::new(BTreeMap::from([("a".to_owned(), "plain".to_owned())]));
        assert_eq!(refused.map(|_| ()), Err("a".to_owned()));
    }

    #[test]
    fn tokens_are_read_one_a_line() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let load = |text: &str| {
            std::fs::write(file.path(), text).unwrap();
            Tokens::load(file.path())
        };
        let tokens = load("# scrapers\nabc\n\n  def  \r\n").unwrap();
        assert!(tokens.len() == 2 && tokens.accepts("abc") && tokens.accepts("def"));
        assert!(!tokens.accepts("ab") && !tokens.accepts("") && !tokens.accepts("# scrapers") && !tokens.accepts("abc\ndef"));
        for (text, expect) in [
            ("", "contains no token"),
            ("# none\n \n", "contains no token"),
            ("two words\nümlaut\n", "token 2 has a character outside ASCII"),
        ] {
            let error = load(text).unwrap_err().to_string();
            assert!(error.contains(expect), "{error}");
        }
    }

    #[test]
    fn basic_credentials_are_decoded() {
        assert_eq!(decode_basic("YTpiOmM="), Some(("a".into(), "b:c".into())));
        assert_eq!(decode_basic("YWJj"), None);
        assert_eq!(decode_basic("%"), None);
    }
}
