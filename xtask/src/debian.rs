//! The Debian mirror in this machine's apt configuration.

use crate::tools::output;
use anyhow::{Context, Result};

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

#[derive(Debug, PartialEq)]
pub struct Mirror {
    pub url: String,
    /// The suite that this machine uses from it.
    pub codename: String,
}

impl Mirror {
    /// A line of an apt source list.
    pub fn source(&self, suite: &str) -> String {
        format!("deb [signed-by={KEYRING}] {} {suite} main\n", self.url)
    }
}

pub fn mirror() -> Result<Mirror> {
    let format = "$(ORIGIN)|$(LABEL)|$(CODENAME)|$(REPO_URI)";
    let listed = output("apt-get", &["indextargets", "--format", format, "Created-By: Packages"]);
    let listed = listed.context("`apt-get indextargets` failed; apt with a configured Debian mirror is required")?;
    parse(&listed).context("apt has no Debian mirror configured; add one to /etc/apt/sources.list.d and run `apt-get update`")
}

/// The first suite of Debian itself. Codenames of updates and backports contain a hyphen.
fn parse(listed: &str) -> Option<Mirror> {
    let own = |line: &str| {
        let (codename, url) = line.strip_prefix("Debian|Debian|")?.split_once('|')?;
        let mirror = Mirror { url: url.trim_end_matches('/').to_owned(), codename: codename.to_owned() };
        (!codename.contains('-')).then_some(mirror)
    };
    listed.lines().find_map(own)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_main_suite_is_chosen() {
        let listed = "Docker|Docker CE|bookworm|https://example.org/docker/\n\
                      Debian|Debian Backports|bookworm-backports|http://example.org/backports/\n\
                      Debian|Debian|bookworm-updates|http://example.org/debian/\n\
                      Debian|Debian|bookworm|http://example.org/debian/\n";
        let mirror = parse(listed).unwrap();
        assert_eq!((&*mirror.url, &*mirror.codename), ("http://example.org/debian", "bookworm"));
        let source = "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://example.org/debian trixie main\n";
        assert_eq!(mirror.source("trixie"), source);
        assert_eq!(parse("Ubuntu|Ubuntu|noble|http://example.org/"), None);
    }
}
