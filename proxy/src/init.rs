//! `penstock-proxy init`: the rules that redirect a pod's connections, on the command line.
//!
//! Each option is also what a pod's annotation of the same name says: `penstock.io/skip-inbound-ports`,
//! `penstock.io/skip-outbound-ports`, `penstock.io/skip-subnets`. What the rules are is `penstock_redirect`'s business.

use std::process::ExitCode;

use clap::Args;
use penstock_api::names::{PROXY_UID, port};
use penstock_redirect::{Answer, Options, Ports, Ruleset, Subnet};

/// The options of `penstock-proxy init`.
#[derive(Args)]
pub(crate) struct Init {
    /// Print the rules as `nft list table inet penstock` would show them, and change nothing
    #[arg(long, conflicts_with_all = ["check", "remove"])]
    dry_run: bool,
    /// Lay nothing, but try what is laid: a connection of each family to an address that exists nowhere
    #[arg(long, conflicts_with = "remove")]
    check: bool,
    /// Take the rules away, whatever they are; open connections go on
    #[arg(long, conflicts_with_all = [
        "proxy_uid", "skip_inbound_ports", "skip_outbound_ports", "skip_subnets", "only_inbound_ports",
        "only_outbound_ports",
    ])]
    remove: bool,
    /// The user that the proxy runs as, whose connections are not redirected
    #[arg(long, value_name = "UID", default_value_t = PROXY_UID)]
    proxy_uid: u32,
    /// Ports of the application that are reached past the proxy, without its mTLS: 9090,7000-7100
    /// (annotation penstock.io/skip-inbound-ports)
    #[arg(long, value_name = "PORTS", default_value = "", hide_default_value = true)]
    skip_inbound_ports: Ports,
    /// Ports elsewhere that the application reaches past the proxy: 25,587
    /// (annotation penstock.io/skip-outbound-ports)
    #[arg(long, value_name = "PORTS", default_value = "", hide_default_value = true)]
    skip_outbound_ports: Ports,
    /// Destinations that the application reaches past the proxy: 169.254.0.0/16,fd00::/8
    /// (annotation penstock.io/skip-subnets)
    #[arg(long, value_name = "SUBNETS", value_delimiter = ',')]
    skip_subnets: Vec<Subnet>,
    /// Redirect only these ports of the application, less those that are skipped. All others are open to everybody,
    /// past the proxy, without mTLS and without policy
    #[arg(long, value_name = "PORTS", default_value = "", hide_default_value = true)]
    only_inbound_ports: Ports,
    /// Redirect only connections to these ports elsewhere, less those that are skipped; others leave in plaintext
    #[arg(long, value_name = "PORTS", default_value = "", hide_default_value = true)]
    only_outbound_ports: Ports,
}

impl Init {
    pub(crate) fn options(&self) -> Options {
        Options {
            proxy_uid: self.proxy_uid,
            skip_inbound: self.skip_inbound_ports.clone(),
            skip_outbound: self.skip_outbound_ports.clone(),
            only_inbound: self.only_inbound_ports.clone(),
            only_outbound: self.only_outbound_ports.clone(),
            skip_subnets: self.skip_subnets.clone(),
        }
    }
}

/// Does what was asked for, and says what it did.
pub(crate) fn run(init: &Init) -> ExitCode {
    let options = init.options();
    if let Err(wrong) = options.sound() {
        eprintln!("penstock-proxy init: {wrong}");
        return ExitCode::from(2);
    }
    match perform(init, &options) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("penstock-proxy init: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn perform(init: &Init, options: &Options) -> anyhow::Result<bool> {
    if !init.remove && !init.check && options.proxy_uid == 0 {
        eprintln!(
            "penstock-proxy init: warning: with --proxy-uid 0 whatever runs as root in this pod is past the proxy, \
             without mTLS and without policy; run the proxy as a user of its own (--proxy-uid {PROXY_UID} is the default)"
        );
    }
    if init.dry_run {
        println!("{}", Ruleset::new(options));
    } else if init.remove {
        println!(
            "{}",
            match penstock_redirect::remove()? {
                true => "removed: these rules redirect nothing any more",
                false => "there was nothing to remove: no table inet penstock in this network namespace",
            }
        );
    } else if init.check {
        return check(options);
    } else {
        penstock_redirect::lay(&Ruleset::new(options))?;
        println!(
            "redirected: inbound to {}, outbound to {}, but for the proxy's own (user {})",
            port::INBOUND,
            port::OUTBOUND,
            options.proxy_uid
        );
    }
    Ok(true)
}

fn check(options: &Options) -> anyhow::Result<bool> {
    let checked = penstock_redirect::check(options, rustix::process::geteuid().as_raw())?;
    let ways = checked.outbound.iter().map(|(family, answer)| (format!("outbound {family}"), answer));
    for (way, answer) in ways.chain([("inbound".to_owned(), &checked.inbound)]) {
        let (word, why) = match answer {
            Answer::Works(why) => ("ok", why),
            Answer::Nothing(why) => ("none", why),
            Answer::Fails(why) => ("FAILED", why),
        };
        println!("{way:<13}  {word:<6}  {why}");
    }
    if !checked.works() {
        let failed = |answer: &Answer| matches!(answer, Answer::Fails(_));
        let any = checked.outbound.iter().any(|(_, answer)| failed(answer)) || failed(&checked.inbound);
        println!(
            "{}",
            if any {
                "the redirect does not work"
            } else {
                "no connection could be tried, so nothing is proven"
            }
        );
    }
    Ok(checked.works())
}
