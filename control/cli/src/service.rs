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

    /// Whether a Service was named.
    pub(crate) fn is_one(&self) -> bool {
        self.0.is_some()
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
    pub(crate) fn must_exist<'a>(&self, known: impl Iterator<Item = &'a str>) -> Result<(), Failure> {
        let Some(wanted) = &self.0 else { return Ok(()) };
        let known: BTreeSet<&str> = known.collect();
        if known.iter().any(|service| self.takes(service)) {
            return Ok(());
        }
        Err(unknown(wanted, &known))
    }

    /// The full name of the one Service that is meant; `None` when all are.
    pub(crate) fn resolve<'a>(
        &self,
        known: impl Iterator<Item = &'a str>,
    ) -> Result<Option<String>, Failure> {
        let Some(wanted) = &self.0 else { return Ok(None) };
        let known: BTreeSet<&str> = known.collect();
        let mut meant = known.iter().copied().filter(|service| self.takes(service));
        match (meant.next(), meant.next()) {
            (None, _) => Err(unknown(wanted, &known)),
            (Some(one), None) => Ok(Some(one.to_owned())),
            (Some(one), Some(other)) => Err(Failure::Usage(format!(
                "{wanted} is a Service of more than one namespace ({one}, {other}, …): write <namespace>/{wanted}"
            ))),
        }
    }
}

/// How many Services an error names.
const NAMED: usize = 8;

fn unknown(wanted: &str, known: &BTreeSet<&str>) -> Failure {
    let named: Vec<&str> = known.iter().copied().filter(|name| !name.is_empty()).take(NAMED + 1).collect();
    let there_are = match named.as_slice() {
        [] => "none at all".to_owned(),
        [first @ .., _] if first.len() == NAMED => {
            format!("{} and more, which `penstock routes` lists", first.join(", "))
        }
        all => all.join(", "),
    };
    Failure::Problem(format!(
        "control knows no Service {wanted}; it knows {there_are}. `penstock check` says which objects it could not read"
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
        let failure = selection("x").resolve(known.into_iter()).unwrap_err();
        assert!(matches!(failure, Failure::Problem(_)));
        assert!(failure.to_string().contains("it knows a/digits, b/digits, b/words."), "{failure}");
        assert!(Selection::default().resolve(known.into_iter()).unwrap().is_none());
    }

    #[test]
    fn what_exists_is_named_and_never_fills_the_screen() {
        let many: Vec<String> = (0..50).map(|i| format!("a/s{i:02}")).collect();
        let told = selection("x").must_exist(many.iter().map(String::as_str)).unwrap_err().to_string();
        assert!(told.contains("a/s07 and more, which `penstock routes` lists"), "{told}");
        assert!(!told.contains("a/s08"), "{told}");
        let told = selection("x").must_exist([].into_iter()).unwrap_err().to_string();
        assert!(told.contains("it knows none at all"), "{told}");
    }
}
