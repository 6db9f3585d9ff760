-- What a batch may spend that is to be made from a file.

alter table submissions
    add column max_tokens bigint,
    add column max_cost_nano bigint;
comment on column submissions.max_tokens is 'What batches.max_tokens becomes; null: any number.';
comment on column submissions.max_cost_nano is
    'What batches.max_cost_nano becomes; null: any amount. Its currency is known once its models are.';
