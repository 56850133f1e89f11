//! The edges of the proxy against the outside: identities against certificates good and bad, and the streams to
//! control against a control that the test plays.

#[cfg(test)]
mod authority;
#[cfg(test)]
mod control;
#[cfg(test)]
mod fleet;
#[cfg(test)]
mod identity;
#[cfg(test)]
mod played;
#[cfg(test)]
mod trace;
