//! `completions` and `man`: what packages install next to the program, made from the command line's own description.

use std::path::PathBuf;

use anyhow::Context as _;
use clap::{Args, Command};
use clap_complete::Shell;

use super::output::print;

#[derive(Args)]
pub struct Completions {
    shell: Shell,
}

#[derive(Args)]
pub struct ManArgs {
    /// Existing directory for gpu-sampler.1 and a page for each command, such as gpu-sampler-run.1
    #[arg(short, long, value_name = "DIR")]
    output: Option<PathBuf>,
}

impl Completions {
    pub fn run(&self, mut program: Command) -> anyhow::Result<()> {
        let name = program.get_name().to_owned();
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut program, name, &mut script);
        print(&String::from_utf8(script).context("the completion script is not UTF-8")?)
    }
}

impl ManArgs {
    pub fn run(&self, program: Command) -> anyhow::Result<()> {
        match &self.output {
            Some(folder) => clap_mangen::generate_to(program, folder)
                .with_context(|| format!("cannot write manual pages to {}", folder.display())),
            None => {
                let mut page = Vec::new();
                clap_mangen::Man::new(program).render(&mut page).context("cannot make the manual page")?;
                print(&String::from_utf8(page).context("the manual page is not UTF-8")?)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;
    use crate::cli::Cli;

    #[test]
    fn every_command_has_a_page() {
        let folder = tempfile::tempdir().unwrap();
        ManArgs { output: Some(folder.path().to_owned()) }.run(Cli::command()).unwrap();
        let program = Cli::command();
        let shown = program.get_subcommands().filter(|command| !command.is_hide_set());
        let mut expected: Vec<String> = shown.map(|command| format!("gpu-sampler-{}.1", command.get_name())).collect();
        expected.push("gpu-sampler.1".to_owned());
        expected.sort();
        let mut pages: Vec<String> =
            std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        pages.sort();
        assert_eq!(pages, expected);
        let run = std::fs::read_to_string(folder.path().join("gpu-sampler-run.1")).unwrap();
        assert!(run.contains(r"\-\-listen") && run.contains("GPU_SAMPLER_CONFIG"), "{run}");
    }

    #[test]
    fn scripts_complete_the_flags_of_commands() {
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "gpu-sampler", &mut script);
            let script = String::from_utf8(script).unwrap();
            assert!(script.contains("nvml-lib") && script.contains("explain"), "{shell}");
        }
    }
}
