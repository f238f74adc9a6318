//! The symbols of a driver of the world's version. The others are hidden: their names in the copied library's string table are changed,
//! so that dlsym does not find them.

use anyhow::{Context as _, bail};

use crate::world::World;

/// Symbols by the first major version that has them.
const SINCE: [(u32, &[&str]); 6] = [
    (
        510,
        &[
            "nvmlDeviceGetComputeRunningProcesses_v3",
            "nvmlDeviceGetGraphicsRunningProcesses_v3",
            "nvmlDeviceGetMPSComputeRunningProcesses_v3",
            "nvmlDeviceGetMemoryInfo_v2",
        ],
    ),
    (
        520,
        &[
            "nvmlGpmQueryDeviceSupport",
            "nvmlGpmSampleAlloc",
            "nvmlGpmSampleFree",
            "nvmlGpmSampleGet",
            "nvmlGpmMigSampleGet",
            "nvmlGpmMetricsGet",
        ],
    ),
    (535, &["nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetSupportedClocksEventReasons"]),
    (545, &["nvmlDeviceGetJpgUtilization", "nvmlDeviceGetOfaUtilization"]),
    (
        550,
        &[
            "nvmlDeviceGetProcessesUtilizationInfo",
            "nvmlDeviceGetRunningProcessDetailList",
            "nvmlDeviceGetConfComputeMemSizeInfo",
        ],
    ),
    (610, &["nvmlDeviceGetAccountingStats_v2"]),
];

/// nvitop infers another layout of process lists from the presence of one without the other.
const TOGETHER: [&str; 2] = ["nvmlDeviceGetRunningProcessDetailList", "nvmlDeviceGetConfComputeMemSizeInfo"];

/// The symbols that the world's driver lacks: by its version, and by the world's `missing`.
pub fn missing(world: &World) -> anyhow::Result<Vec<String>> {
    let listed = |name: &&str| world.missing.iter().any(|missing| missing == name);
    if TOGETHER.iter().filter(|name| listed(name)).count() == 1 {
        bail!("missing: {} and {} must both be missing or both be present; list both", TOGETHER[0], TOGETHER[1]);
    }
    let major = world.driver_major().unwrap_or(0);
    let later = SINCE.iter().filter(|(since, _)| major < *since).flat_map(|(_, names)| *names);
    let mut names: Vec<String> = later.map(|name| (*name).to_owned()).chain(world.missing.iter().cloned()).collect();
    names.sort();
    names.dedup();
    Ok(names)
}

fn number(image: &[u8], at: usize, bytes: usize) -> Option<usize> {
    let mut number = [0; 8];
    number[..bytes].copy_from_slice(image.get(at..at + bytes)?);
    usize::try_from(u64::from_le_bytes(number)).ok()
}

/// A section as (offset, size), with its type; for a table also the section of its link.
struct Section {
    kind: usize,
    at: usize,
    size: usize,
    link: usize,
}

fn sections(image: &[u8]) -> Option<Vec<Section>> {
    // ELF64 as in elf.h: e_shoff, e_shentsize, e_shnum; sh_type, sh_offset, sh_size, sh_link.
    let (table, each, count) = (number(image, 40, 8)?, number(image, 58, 2)?, number(image, 60, 2)?);
    let section = |n: usize| {
        let head = table + n * each;
        let field = |at, bytes| number(image, head + at, bytes);
        Some(Section { kind: field(4, 4)?, at: field(24, 8)?, size: field(32, 8)?, link: field(40, 4)? })
    };
    (0..count).map(section).collect()
}

/// Offsets of the names of the dynamic symbols.
fn dynamic_names(image: &[u8]) -> Option<Vec<usize>> {
    const DYNSYM: usize = 11;
    const SYMBOL_BYTES: usize = 24;
    let sections = sections(image)?;
    let symbols = sections.iter().find(|s| s.kind == DYNSYM)?;
    let strings = sections.get(symbols.link)?;
    (0..symbols.size / SYMBOL_BYTES).map(|n| Some(strings.at + number(image, symbols.at + n * SYMBOL_BYTES, 4)?)).collect()
}

/// Hides symbols; a missing symbol is an error.
pub fn hide(image: &mut [u8], names: &[String]) -> anyhow::Result<()> {
    let offsets = dynamic_names(image).context("the library is not a 64-bit ELF file with sections")?;
    for name in names {
        let wanted = [name.as_bytes(), b"\0"].concat();
        let offset = offsets.iter().find(|at| image.get(**at..**at + wanted.len()) == Some(&wanted));
        let offset = *offset.with_context(|| format!("missing: the library has no symbol {name} that could be removed"))?;
        // The hash of the old name still leads here, but the comparison of names fails.
        image[offset] = b'_';
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn world(keys: &str) -> World {
        World::parse(keys).unwrap()
    }

    #[test]
    fn a_version_has_the_symbols_of_its_drivers() {
        let check = |keys: &str, name: &str, present: bool| {
            assert_eq!(!missing(&world(keys)).unwrap().contains(&name.to_owned()), present, "{keys}: {name}");
        };
        for (version, v3, gpm, info) in [
            ("470.1", false, false, false),
            ("515.1", true, false, false),
            ("535.1", true, true, false),
            ("550.54.14", true, true, true),
        ] {
            let keys = format!("driver_version = '{version}'");
            check(&keys, "nvmlDeviceGetComputeRunningProcesses", true);
            check(&keys, "nvmlDeviceGetComputeRunningProcesses_v2", true);
            check(&keys, "nvmlDeviceGetComputeRunningProcesses_v3", v3);
            check(&keys, "nvmlDeviceGetMemoryInfo_v2", v3);
            check(&keys, "nvmlGpmMetricsGet", gpm);
            check(&keys, "nvmlDeviceGetProcessesUtilizationInfo", info);
            check(&keys, "nvmlDeviceGetConfComputeMemSizeInfo", info);
        }
        for (version, sums) in [("550.54.14", false), ("580.95.05", false), ("610.1", true)] {
            check(&format!("driver_version = '{version}'"), "nvmlDeviceGetAccountingStats_v2", sums);
        }
        check("missing = ['nvmlDeviceGetSamples']", "nvmlDeviceGetSamples", false);
        let one = missing(&world("missing = ['nvmlDeviceGetConfComputeMemSizeInfo']")).unwrap_err();
        assert!(one.to_string().contains("list both"));
    }
}
