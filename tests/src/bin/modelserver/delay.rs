//! A simulated GPU: how long an execution lasts, by its rows.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// The usual shape of a GPU's service time: a launch that costs the same for any batch, and a cost for each row.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct DelayModel {
    fixed: Duration,
    row: Duration,
}

impl DelayModel {
    /// The least time that an execution of so many rows takes.
    pub(crate) fn service_time(self, rows: u64) -> Duration {
        self.fixed + self.row.saturating_mul(u32::try_from(rows).unwrap_or(u32::MAX))
    }
}

impl fmt::Display for DelayModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (fixed, row) = (humantime::format_duration(self.fixed), humantime::format_duration(self.row));
        write!(f, "fixed={fixed},row={row}")
    }
}

impl FromStr for DelayModel {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut model = Self { fixed: Duration::ZERO, row: Duration::ZERO };
        for part in text.split(',') {
            let (name, value) = part.split_once('=').ok_or_else(|| format!("{part:?} is not NAME=TIME"))?;
            let value = humantime::parse_duration(value).map_err(|problem| format!("{part:?}: {problem}"))?;
            match name.trim() {
                "fixed" => model.fixed = value,
                "row" => model.row = value,
                other => {
                    return Err(format!("{other:?} is not a part of the model; there are fixed and row"));
                }
            }
        }
        Ok(model)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_add_to_what_is_fixed() {
        let model: DelayModel = "fixed=2ms,row=50us".parse().unwrap();
        assert_eq!(model.service_time(1), Duration::from_micros(2050));
        assert_eq!(model.service_time(32), Duration::from_micros(3600));
        assert_eq!(model.to_string(), "fixed=2ms,row=50us");
        assert_eq!("fixed=2ms,column=1us".parse::<DelayModel>().unwrap_err().split(';').count(), 2);
    }
}
