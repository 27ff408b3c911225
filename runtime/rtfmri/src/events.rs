//! To follow: events.
