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
    /// Take the rules away; open connections go on
    #[arg(long)]
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
    /// Redirect only these ports of the application, less those that are skipped
    #[arg(long, value_name = "PORTS", default_value = "", hide_default_value = true)]
    only_inbound_ports: Ports,
    /// Redirect only connections to these ports elsewhere, less those that are skipped
    #[arg(long, value_name = "PORTS", default_value = "", hide_default_value = true)]
    only_outbound_ports: Ports,
    /// Where the proxy takes the mesh's connections
    #[arg(long, value_name = "PORT", default_value_t = port::INBOUND, value_parser = clap::value_parser!(u16).range(1..))]
    inbound_port: u16,
    /// Where the proxy takes the application's connections
    #[arg(long, value_name = "PORT", default_value_t = port::OUTBOUND, value_parser = clap::value_parser!(u16).range(1..))]
    outbound_port: u16,
}

impl Init {
    fn options(&self) -> Options {
        Options {
            proxy_uid: self.proxy_uid,
            inbound: self.inbound_port,
            outbound: self.outbound_port,
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
    match perform(init) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("penstock-proxy init: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn perform(init: &Init) -> anyhow::Result<bool> {
    let options = init.options();
    options.sound().map_err(anyhow::Error::msg)?;
    if init.dry_run {
        println!("{}", Ruleset::new(&options));
    } else if init.remove {
        penstock_redirect::remove()?;
        println!("removed: nothing is redirected in this network namespace");
    } else if init.check {
        return check(&options);
    } else {
        penstock_redirect::lay(&Ruleset::new(&options))?;
        println!(
            "redirected: inbound to {}, outbound to {}, but for the proxy's own (user {})",
            options.inbound, options.outbound, options.proxy_uid
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
