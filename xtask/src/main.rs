//! The developer's tool: `cargo xtask VERB`. This file only dispatches to the verb.
//!
//! It has few dependencies, because on a bare machine it is compiled before anything else.
#![deny(unsafe_code)]

mod agent;
mod arch;
mod bench;
mod build;
mod chart;
mod dashboards;
mod debian;
mod demo;
mod dist;
mod dockerd;
mod docs;
mod ebpf;
mod fuzz;
mod gpu;
mod janitor;
mod lint;
mod package;
mod pinned;
mod setup;
mod soak;
#[expect(unsafe_code, reason = "system calls that std does not offer: signals, prctl")]
mod sys;
mod test;
mod tools;
mod vm;

use std::process::ExitCode;

const HELP: &str = "\
cargo xtask VERB

  setup [--check] [--yes]          install what the kernel program's build and the tests need
  demo [--for 30s] [--sim|--real]  run containers on a GPU, the agent, and a live table of GPU use
  test [--noise[=MODULE,..]] [FILTER..]
                                   run all tests, on real engines and the real kernel (root); --noise: all, or those of these
                                   modules, next to busy processors, pods of others that come and go, and a containerd of others
  soak [--for 30m] [--seed N] [--faults NAME,..]
                                   run the agent with random faults, and check its results and its cost (root)
  bench [FILTER..]                 measure speed and memory against their targets (root)
  gpu [--for 60s] [-o FOLDER] [--built FOLDER]
                                   record this machine's NVIDIA driver for the tests to replay (root); --built: with
                                   the programs of that folder, for a machine without Rust
  fuzz [TARGET..] [--for 10s] [--list]
                                   search for inputs that make parsers fail, each target for that time, with coverage
                                   guidance; findings become inputs of `cargo test`
  vm KERNEL [--debug] -- COMMAND ..  run a command in a virtual machine with that Debian kernel, such as 7.3 (root); --debug:
                                   with the programs of the tests
  matrix [KERNEL..] [--layout L..] [--debug] [--no-package] [--check]
                                   run the agent on each kernel and layout of cgroups in virtual machines, and write what
                                   works to docs/support.md (root); --no-package: without installing, upgrading and
                                   removing the .deb on layout v2; --check: write nothing
  lint [CHECK..]                   check format, imports, families, monitoring, words, clippy, licences, home-paths
  build [--debug] [--target ARCH]  build the kernel program, the agent, the simulator with its scorer; --target: for x86_64 or
                                   aarch64, by cross-compilation with the compilers of Debian
  docs [dashboards]                rewrite docs/metrics.md and the Grafana dashboards, or these alone
  chart [--check]                  render the Helm chart's manifests, snapshots and README, or check them
  dist [simulator] [--target ARCH]  build a release tarball and its SPDX list of crates in target/dist; simulator: that of the
                                   simulated driver and of the program that scores exporters
  package [--target ARCH]          build the .deb and the .rpm in target/dist, and check them
";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if std::env::var_os(fuzz::WRAPPER).is_some() {
        return fuzz::rustc(&args);
    }
    let (verb, rest) = match args.split_first() {
        Some((verb, rest)) => (verb.as_str(), rest),
        None => ("help", &[][..]),
    };
    let done = match verb {
        "setup" => setup::verb(rest),
        "demo" => demo::verb(rest),
        "test" => test::verb(rest),
        "soak" => soak::verb(rest),
        "bench" => bench::verb(rest),
        "fuzz" => fuzz::verb(rest),
        "gpu" => gpu::verb(rest),
        "vm" => vm::verb(rest),
        "matrix" => vm::matrix::verb(rest),
        "lint" => lint::verb(rest),
        "build" => build::verb(rest),
        "build-ebpf" => ebpf::verb(rest),
        "docs" => docs::verb(rest),
        "chart" => chart::verb(rest),
        "dist" => dist::verb(rest),
        "package" => package::verb(rest),
        janitor::VERB => janitor::verb(),
        "help" | "--help" | "-h" => {
            print!("{HELP}");
            Ok(())
        }
        other => Err(tools::Usage(format!("unknown verb '{other}'\n\n{HELP}")).into()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(problem) => {
            eprintln!("xtask {verb}: {problem:#}");
            let usage = problem.downcast_ref::<tools::Usage>().map(|_| 2);
            let ended = problem.downcast_ref::<tools::Ended>().map(|ended| ended.status);
            match sys::interrupted() {
                Some(signal) => ExitCode::from(128 + signal),
                None => ExitCode::from(usage.or(ended).unwrap_or(1)),
            }
        }
    }
}
