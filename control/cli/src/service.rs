//! The SERVICE argument: `digits` in whatever namespace, or `demo/digits`.

use std::collections::BTreeSet;

use crate::failure::Failure;

/// Which Services a command is about.
#[derive(Clone, Debug, Default)]
pub(crate) struct Selection(Option<String>);

impl Selection {
    /// `None` selects all.
    pub(crate) fn of(argument: Option<String>) -> Self {
        Self(argument)
    }

    /// Whether the Service, `<namespace>/<name>`, is selected.
    pub(crate) fn takes(&self, service: &str) -> bool {
        match self.0.as_deref() {
            None => true,
            Some(wanted) if wanted.contains('/') => service == wanted,
            Some(wanted) => service.rsplit('/').next() == Some(wanted),
        }
    }

    /// Fails when a Service was named and control knows none of that name.
    pub(crate) fn must_exist<'a>(&self, mut known: impl Iterator<Item = &'a str>) -> Result<(), Failure> {
        match &self.0 {
            Some(wanted) if !known.any(|service| self.takes(service)) => Err(unknown(wanted)),
            _ => Ok(()),
        }
    }

    /// The full name of the one Service that is meant; `None` when all are.
    pub(crate) fn resolve<'a>(
        &self,
        known: impl Iterator<Item = &'a str>,
    ) -> Result<Option<String>, Failure> {
        let Some(wanted) = &self.0 else { return Ok(None) };
        let meant: BTreeSet<&str> = known.filter(|service| self.takes(service)).collect();
        let mut meant = meant.into_iter();
        match (meant.next(), meant.next()) {
            (None, _) => Err(unknown(wanted)),
            (Some(one), None) => Ok(Some(one.to_owned())),
            (Some(one), Some(other)) => Err(Failure::Usage(format!(
                "{wanted} is a Service of more than one namespace ({one}, {other}, …): write <namespace>/{wanted}"
            ))),
        }
    }
}

fn unknown(wanted: &str) -> Failure {
    Failure::Problem(format!(
        "control knows no Service {wanted}: `penstock routes` lists those that it knows, `penstock check` says \
         which objects it could not read"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn selection(argument: &str) -> Selection {
        Selection::of(Some(argument.to_owned()))
    }

    #[test]
    fn a_name_selects_in_all_namespaces_and_a_full_name_in_one() {
        assert!(Selection::default().takes("a/digits"));
        assert!(selection("digits").takes("a/digits"));
        assert!(selection("a/digits").takes("a/digits"));
        assert!(!selection("b/digits").takes("a/digits"));
        assert!(!selection("digit").takes("a/digits"));
    }

    #[test]
    fn a_name_that_means_two_services_or_none_is_refused() {
        let known = ["a/digits", "b/digits", "b/words", "b/words"];
        assert_eq!(selection("words").resolve(known.into_iter()).unwrap().as_deref(), Some("b/words"));
        assert!(matches!(selection("digits").resolve(known.into_iter()), Err(Failure::Usage(_))));
        assert!(matches!(selection("x").resolve(known.into_iter()), Err(Failure::Problem(_))));
        assert!(Selection::default().resolve(known.into_iter()).unwrap().is_none());
    }
}
