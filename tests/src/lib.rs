//! What the tests with real guests share: a guest with its agent and its daemon ([`scene`]), a service to talk to at
//! either end ([`peer`]), what can go wrong in between ([`tap`]), transfers that go on while it does ([`traffic`]),
//! certificates ([`creds`]), and what to measure ([`measure`]).

pub mod creds;
pub mod measure;
pub mod peer;
pub mod relay;
pub mod scene;
pub mod tap;
pub mod traffic;
