//! The client's examples do what they say, on a node of real processes.

use anyhow::{Result, anyhow, ensure};
use swiftcache_tests::{PATIENCE, engine::eventually, node::Node, operator::Operator};

#[path = "../../client/core/examples/borrower.rs"]
mod borrower;
#[path = "../../client/core/examples/donor.rs"]
mod donor;

#[test]
fn what_the_borrower_stores_in_what_the_donor_lends_comes_back() -> Result<()> {
    let node = Node::start(&[])?;
    let lent = donor::lend(node.socket(), node.device(1).as_str(), 2, 1 << 20);
    let donor = lent.map_err(|error| anyhow!("{error}"))?;
    let load = || borrower::store_and_load(node.socket(), node.device(0).as_str());
    let right = load().map_err(|error| anyhow!("{error}"))?;
    ensure!(right == 4, "{right} blocks came back");
    ensure!(donor.close(PATIENCE), "it was not given back");
    // The twin: with nothing on offer there is nothing to keep it in.
    eventually("the donor to be gone", || {
        Ok(Operator::of(&node)?.regions()?.is_empty())
    })?;
    let refused = load().expect_err("no donor").to_string();
    ensure!(refused.contains("no donor"), "{refused}");
    Ok(())
}
