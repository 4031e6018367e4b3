//! `swiftcache completions` and `swiftcache man`. Both are made from the definition of the command line, so that they
//! always match it.

use clap::{Args, Command};
use clap_complete::Shell;

use super::{CliError, output};

/// Print completions for a shell
///
/// Example: swiftcache completions bash > /etc/bash_completion.d/swiftcache
#[derive(Args, Debug)]
pub(super) struct CompletionsArgs {
    shell: Shell,
}

/// Print the manual page of swiftcache, or of one of its commands
///
/// Example: swiftcache man > /usr/share/man/man1/swiftcache.1
#[derive(Args, Debug)]
pub(super) struct ManArgs {
    /// A command, for example donate
    command: Option<String>,
}

pub(super) fn complete(args: &CompletionsArgs, command: Command) -> Result<(), CliError> {
    output::print(&completions(args.shell, command)?).map(|_| ())
}

pub(super) fn man(args: &ManArgs, command: Command) -> Result<(), CliError> {
    output::print(&page(args.command.as_deref(), command)?).map(|_| ())
}

fn completions(shell: Shell, mut command: Command) -> Result<String, CliError> {
    let name = command.get_name().to_owned();
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut command, name, &mut script);
    text(script)
}

fn page(of: Option<&str>, mut command: Command) -> Result<String, CliError> {
    command.build();
    let command = match of {
        None => command,
        Some(name) => {
            let mut visible = command.get_subcommands().filter(|sub| !sub.is_hide_set());
            let found = visible.find(|sub| sub.get_name() == name);
            let found =
                found.ok_or_else(|| CliError::Usage(format!("there is no command {name}")))?;
            found.clone()
        }
    };
    let mut page = Vec::new();
    let rendered = clap_mangen::Man::new(command).render(&mut page);
    rendered.map_err(|error| CliError::Failed(format!("cannot write the manual: {error}")))?;
    text(page)
}

fn text(bytes: Vec<u8>) -> Result<String, CliError> {
    String::from_utf8(bytes).map_err(|error| CliError::Failed(error.to_string()))
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, ValueEnum};

    use super::{super::Cli, *};

    #[test]
    fn every_shell_is_completed() {
        for shell in Shell::value_variants() {
            let script = completions(*shell, Cli::command()).unwrap();
            for word in ["donate", "doctor", "elastic"] {
                assert!(script.contains(word), "{shell}: no {word}");
            }
        }
    }

    #[test]
    fn every_command_has_its_page() {
        let whole = page(None, Cli::command()).unwrap();
        assert!(whole.contains(".TH swiftcache 1"), "{whole}");
        let command = Cli::command();
        for sub in command.get_subcommands().filter(|sub| !sub.is_hide_set()) {
            let name = sub.get_name();
            assert!(
                whole.contains(&name.replace('-', "\\-")),
                "{name} is not in the page"
            );
            let page = page(Some(name), Cli::command()).unwrap();
            assert!(page.contains(&format!("swiftcache\\-{name}")), "{page}");
        }
        let absent = page(Some("tether"), Cli::command()).unwrap_err();
        assert_eq!(absent.exit_code(), 2, "hidden ones have none");
        page(Some("nonsense"), Cli::command()).unwrap_err();
    }
}
