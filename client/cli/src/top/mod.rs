//! `swiftcache top`: shows the node on one screen and updates it.

mod bars;
mod rows;
mod screen;

use std::{
    io::IsTerminal,
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use clap::Args;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};

use super::{CliError, admin::Admin, args::SocketArg};
use screen::Screen;

/// Time between two checks for a key.
const NAP: Duration = Duration::from_millis(100);
/// How many events are fetched: more than any screen has lines.
const EVENTS: u32 = 100;

/// Watch devices, leases, hits and events on a full screen; q quits
#[derive(Args, Debug)]
pub(super) struct TopArgs {
    #[command(flatten)]
    socket: SocketArg,
    /// Time between two updates
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = crate::watch::every)]
    every: Duration,
}

pub(super) fn run(args: &TopArgs) -> Result<(), CliError> {
    if !std::io::stdout().is_terminal() {
        let problem = "top needs a terminal; without one, use `swiftcache status --watch`";
        return Err(CliError::Usage(problem.to_owned()));
    }
    let interrupt = super::interrupt()?;
    // It is an error if there is no broker now. If the broker goes away later, wait for it.
    let mut admin = Some(Admin::connect(&args.socket.socket)?);
    let failed = |error: std::io::Error| CliError::Failed(format!("the terminal: {error}"));
    let mut terminal = ratatui::try_init().map_err(failed)?;
    let mut screen = Screen::default();
    let mut asked: Option<Instant> = None;
    let ended = loop {
        if asked.is_none_or(|asked| asked.elapsed() >= args.every) {
            asked = Some(Instant::now());
            match refresh(&mut admin, args, &mut screen) {
                Ok(()) => {}
                Err(error @ CliError::NoBroker { .. }) => screen.problem = Some(error.to_string()),
                Err(error) => break Err(error),
            }
        }
        if let Err(error) = terminal.draw(|frame| screen.render(frame)) {
            break Err(failed(error));
        }
        if interrupt.load(Ordering::Relaxed) {
            break Err(CliError::Interrupted);
        }
        match pressed() {
            // In raw mode the terminal sends no signal for it.
            Ok(Some(key)) if interrupts(key) => break Err(CliError::Interrupted),
            Ok(Some(key)) if quits(key) => break Ok(()),
            Ok(_) => {}
            Err(error) => break Err(failed(error)),
        }
    };
    ratatui::try_restore().map_err(failed)?;
    ended
}

fn refresh(admin: &mut Option<Admin>, args: &TopArgs, screen: &mut Screen) -> Result<(), CliError> {
    let connected = match admin.take() {
        Some(connected) => connected,
        None => Admin::connect(&args.socket.socket)?,
    };
    let snapshot = connected.snapshot()?;
    let events = connected.events(EVENTS)?;
    *admin = Some(connected);
    screen.update(snapshot, events);
    Ok(())
}

/// The key that is pressed within [`NAP`], if any.
fn pressed() -> std::io::Result<Option<KeyEvent>> {
    if !event::poll(NAP)? {
        return Ok(None);
    }
    Ok(match event::read()? {
        Event::Key(key) if key.kind == KeyEventKind::Press => Some(key),
        _ => None,
    })
}

/// Whether a key quits.
fn quits(key: KeyEvent) -> bool {
    matches!(key.code, KeyCode::Char('q') | KeyCode::Esc)
}

/// Whether it is Ctrl-C.
fn interrupts(key: KeyEvent) -> bool {
    key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn q_and_escape_quit_and_control_c_interrupts() {
        let key = KeyEvent::new;
        let none = KeyModifiers::NONE;
        assert!(quits(key(KeyCode::Char('q'), none)) && quits(key(KeyCode::Esc, none)));
        assert!(interrupts(key(KeyCode::Char('c'), KeyModifiers::CONTROL)));
        for other in [key(KeyCode::Char('c'), none), key(KeyCode::Enter, none)] {
            assert!(!quits(other) && !interrupts(other));
        }
    }
}
