//! `cargo xtask bench`: every way into a guest, measured side by side.
//!
//! A figure of one way means nothing by itself: the machine is shared, and the guest is emulated where there is no KVM.
//! So each way has a guest of its own, all of them are up at once, and every case goes round all ways before the next
//! round begins (A B C A B C): a drift of the machine hits all alike, and what is said in the end are ratios within a round,
//! with their spread.
//!
//! | file | what it knows |
//! | --- | --- |
//! | `ways` | the ways: ours, the floors under it, and what a user would pick instead |
//! | `cases` | what is measured of each, and how |
//! | `run` | the order of it all, and the progress shown |
//! | `results` | the figures, as they are kept in `results.json` |
//! | `spread` | medians and ratios of them |
//! | `goals` | what the ratios are to be, and what they are |
//! | `report` | the page with its plots, the table on the terminal, and the document |

mod goals;
mod report;
mod results;
#[cfg(test)]
mod sample;
mod spread;
mod ways;

fn main() {}
