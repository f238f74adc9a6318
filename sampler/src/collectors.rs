//! Which families a scrape gets: `collect[]`, as the exporters of Prometheus have it, over a default.

use strum::VariantArray as _;
use thiserror::Error;

/// Stands for the default in `collect[]`, so that a scrape can add to it.
const DEFAULT: &str = "default";
const ALL: &str = "all";
const PARAMETER: &str = "collect[]";

/// A group of families.
#[derive(Clone, Copy, Debug, PartialEq, Eq, strum::EnumString, strum::IntoStaticStr, strum::VariantArray)]
#[strum(serialize_all = "kebab-case")]
pub enum Collector {
    Accelerators,
    Containers,
    Users,
    Gpus,
    Agent,
    Pressure,
    Contenders,
    Engines,
    Shares,
    Holding,
    Precision,
    Samples,
    Calls,
    /// Has no family: adds `_created` to the counters and histograms of the others.
    Created,
}

impl Collector {
    pub fn name(self) -> &'static str {
        self.into()
    }

    pub fn is_default(self) -> bool {
        matches!(self, Self::Accelerators | Self::Containers | Self::Users | Self::Gpus | Self::Agent)
    }

    const fn bit(self) -> u32 {
        1 << self as u32
    }
}

#[derive(Debug, Error)]
#[error("expected {DEFAULT}, {ALL} or one of {}", known())]
pub struct UnknownCollector {
    pub name: String,
}

fn known() -> String {
    Collector::VARIANTS.iter().map(|collector| collector.name()).collect::<Vec<_>>().join(", ")
}

/// A set of collectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Selection(u32);

impl Default for Selection {
    fn default() -> Self {
        let default = Collector::VARIANTS.iter().filter(|collector| collector.is_default());
        Self(default.fold(0, |bits, collector| bits | collector.bit()))
    }
}

impl Selection {
    /// Every family. `created` doubles the series of most pages and is only selected by its name.
    pub const ALL: Self = Self(!Collector::Created.bit());

    /// `default` is what the name of the default stands for.
    pub fn new<'a>(names: impl IntoIterator<Item = &'a str>, default: Selection) -> Result<Self, UnknownCollector> {
        let bits = names.into_iter().try_fold(0, |bits, name| {
            let more = match name {
                DEFAULT => default.0,
                ALL => Self::ALL.0,
                name => name.parse::<Collector>().map_err(|_| UnknownCollector { name: name.to_owned() })?.bit(),
            };
            Ok(bits | more)
        });
        bits.map(Self)
    }

    /// The selection of a request; `default` if it makes none.
    pub fn of_query(query: &str, default: Selection) -> Result<Self, UnknownCollector> {
        let parameters: Vec<_> = form_urlencoded::parse(query.as_bytes()).filter(|(name, _)| name == PARAMETER).collect();
        if parameters.is_empty() { Ok(default) } else { Self::new(parameters.iter().map(|(_, value)| &**value), default) }
    }

    pub fn has(self, collector: Collector) -> bool {
        self.0 & collector.bit() != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_narrows_or_widens_the_default() {
        let default = Selection::default();
        let of = |query| Selection::of_query(query, default).unwrap();
        assert_eq!((of(""), of("x=1")), (default, default));
        assert!(default.has(Collector::Containers) && !default.has(Collector::Contenders));
        let narrow = of("collect[]=gpus");
        assert!(narrow.has(Collector::Gpus) && !narrow.has(Collector::Containers));
        let wide = of("collect%5B%5D=default&collect[]=contenders");
        assert!(wide.has(Collector::Gpus) && wide.has(Collector::Contenders) && !wide.has(Collector::Calls));
        let all = of("collect[]=all");
        assert!(Collector::VARIANTS.iter().all(|collector| all.has(*collector) == (*collector != Collector::Created)));
        let created = of("collect[]=default&collect[]=created");
        assert!(created.has(Collector::Gpus) && created.has(Collector::Created) && !default.has(Collector::Created));
        let error = Selection::of_query("collect[]=gpu", default).unwrap_err();
        assert_eq!(error.name, "gpu");
        assert!(error.to_string().starts_with("expected default, all or one of accelerators, "), "{error}");
    }

    /// A query string: a selection, or an error that names a collector of the query.
    #[test]
    fn fuzz_collect() {
        devkit::fuzz(file!(), "collect", move |bytes| {
            let query = String::from_utf8_lossy(bytes);
            match Selection::of_query(&query, Selection::default()) {
                Ok(selection) => assert!(query.contains("collect") || query.contains('%') || selection == Selection::default()),
                Err(error) => assert!(error.name.parse::<Collector>().is_err() && error.name.len() <= 3 * query.len()),
            }
        });
    }
}
