//! `completions` and `man`: made from the definitions of the command line, so that they never lag behind it.

use clap::{Command, CommandFactory};
use clap_complete::Shell;
use clap_mangen::Man;

use super::{Outcome, print};
use crate::cli::Cli;
use crate::error::{Error, Result};

pub fn completions(shell: Shell) -> Result<Outcome> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "outbox-relay", &mut script);
    print(&String::from_utf8_lossy(&script))?;
    Ok(Outcome::Well)
}

pub fn man() -> Result<Outcome> {
    let page = page().map_err(|error| Error::Server(format!("the manual page can't be made: {error}")))?;
    print(&page)?;
    Ok(Outcome::Well)
}

const END: &str = ".SH \"EXIT STATUS\"\n\
    0: well. 1: not well. 2: nothing matched. 64: wrong usage or configuration; one line on standard error says what.\n";

/// One page for all: what clap_mangen makes of the whole, then a section for each command.
fn page() -> std::io::Result<String> {
    let whole = Man::new(Cli::command());
    let mut page = Vec::new();
    whole.render_title(&mut page)?;
    whole.render_name_section(&mut page)?;
    whole.render_synopsis_section(&mut page)?;
    whole.render_description_section(&mut page)?;
    whole.render_options_section(&mut page)?;
    let mut page = String::from_utf8_lossy(&page).into_owned();
    for command in Cli::command().get_subcommands() {
        sections(command, "outbox-relay", &mut page)?;
    }
    Ok(page + END)
}

/// Of a command that has some of its own, those.
fn sections(command: &Command, parent: &str, page: &mut String) -> std::io::Result<()> {
    let path = format!("{parent} {}", command.get_name());
    if command.has_subcommands() {
        return command.get_subcommands().try_for_each(|command| sections(command, &path, page));
    }
    let mut options = Vec::new();
    Man::new(command.clone().disable_help_flag(true)).render_options_section(&mut options)?;
    let about = command.get_about().map(ToString::to_string).unwrap_or_default();
    page.push_str(&format!(".SH \"{}\"\n{about}.\n", path.to_uppercase()));
    let options = String::from_utf8_lossy(&options);
    let options = options.split_once(".SH OPTIONS\n").map_or("", |(_, options)| options);
    page.push_str(options);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_definitions_are_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_page_has_each_command_and_its_flags() {
        let page = page().expect("a page");
        for part in [
            ".TH outbox-relay 1",
            "OUTBOX-RELAY DEAD REPLAY",
            "OUTBOX-RELAY STATUS",
            "\\-\\-older\\-than",
            "EXIT STATUS",
        ] {
            assert!(page.contains(part), "{part} is not in\n{page}");
        }
    }
}
