"""What a conversion costs trained models, and how much of it ten minutes of training get back."""
