//! What the stream at hand can show: colour, redrawing in place, so many columns.
//!
//! Colours only on a terminal, never with `NO_COLOR` (no-color.org) or `TERM=dumb`. Everything is read once at
//! start and passed on, so that what is printed depends on nothing else.

use std::io::IsTerminal;
use std::os::fd::AsFd;

/// Columns of a terminal that does not tell.
const USUAL_WIDTH: usize = 100;

/// How a text stands out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Tone {
    /// As the rest.
    #[default]
    Plain,
    /// As it should be.
    Good,
    /// Worth a look.
    Warn,
    /// Wrong.
    Bad,
    /// Headings and totals.
    Strong,
    /// Said for completeness.
    Faint,
}

/// One output stream.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Terminal {
    /// A person looks at it live, so lines may be redrawn.
    pub(crate) live: bool,
    colour: bool,
    width: usize,
}

impl Terminal {
    /// A file, a pipe, or a test.
    pub(crate) const PLAIN: Self = Self { live: false, colour: false, width: USUAL_WIDTH };

    /// Looks at a stream and the environment.
    pub(crate) fn of(stream: &(impl IsTerminal + AsFd)) -> Self {
        let capable = std::env::var_os("TERM").is_none_or(|term| term != "dumb");
        if !stream.is_terminal() || !capable {
            return Self::PLAIN;
        }
        let colour = std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        let width = match rustix::termios::tcgetwinsize(stream) {
            Ok(size) if size.ws_col > 0 => usize::from(size.ws_col),
            _ => USUAL_WIDTH,
        };
        Self { live: true, colour, width }
    }

    /// Wraps `text` in the tone's colour, if there are colours.
    pub(crate) fn paint(self, tone: Tone, text: &str) -> String {
        let code = match tone {
            Tone::Plain => return text.to_owned(),
            _ if !self.colour => return text.to_owned(),
            Tone::Good => "32",
            Tone::Warn => "33",
            Tone::Bad => "31",
            Tone::Strong => "1",
            Tone::Faint => "2",
        };
        format!("\x1b[{code}m{text}\x1b[0m")
    }

    /// Cuts a line to the width, so that it cannot wrap and spoil a redraw. Escape sequences take no room.
    pub(crate) fn fit(self, line: &str) -> String {
        let mut fitted = String::with_capacity(line.len());
        let (mut columns, mut escape) = (0, false);
        for character in line.chars() {
            if escape || character == '\x1b' {
                escape = character != 'm';
                fitted.push(character);
            } else if columns < self.width {
                columns += 1;
                fitted.push(character);
            }
        }
        fitted
    }
}

/// Draws a block of lines over the one drawn before.
#[derive(Debug, Default)]
pub(crate) struct Redraw {
    lines: usize,
}

impl Redraw {
    /// What to write so that `block` stands where the last one stood.
    pub(crate) fn frame(&mut self, terminal: Terminal, block: &str) -> String {
        let mut frame = self.erase();
        for line in block.lines() {
            frame.push_str(&terminal.fit(line));
            frame.push('\n');
            self.lines += 1;
        }
        frame
    }

    /// What to write so that nothing stands where the last block stood.
    pub(crate) fn erase(&mut self) -> String {
        match std::mem::take(&mut self.lines) {
            0 => String::new(),
            // Up to the block's first line, then clear to the end of the screen.
            lines => format!("\x1b[{lines}F\x1b[J"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NARROW: Terminal = Terminal { live: true, colour: true, width: 8 };

    #[test]
    fn colours_only_where_they_show() {
        assert_eq!(Terminal::PLAIN.paint(Tone::Bad, "no"), "no");
        assert_eq!(NARROW.paint(Tone::Bad, "no"), "\x1b[31mno\x1b[0m");
        assert_eq!(NARROW.paint(Tone::Plain, "no"), "no");
    }

    #[test]
    fn a_cut_line_keeps_its_colours_closed() {
        assert_eq!(NARROW.fit("\x1b[31m123456789\x1b[0m"), "\x1b[31m12345678\x1b[0m");
    }

    #[test]
    fn a_frame_replaces_the_last_one() {
        let mut redraw = Redraw::default();
        assert_eq!(redraw.frame(NARROW, "a\nb"), "a\nb\n");
        assert_eq!(redraw.frame(NARROW, "c"), "\x1b[2F\x1b[Jc\n");
        assert_eq!(redraw.erase(), "\x1b[1F\x1b[J");
        assert_eq!(redraw.erase(), "");
    }
}
